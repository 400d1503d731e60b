// Against a fake: what the cache may answer, told and untold.
import assert from 'node:assert/strict'
import { once } from 'node:events'
import { afterEach, beforeEach, describe, mock, test } from 'node:test'

import { Secretier } from 'secretier'

import { Fake, PATIENCE, json, within } from './support.mjs'

const secret = (value) => ({ tenant: 'acme', key: 'K', value, version: 1 })

describe('the cache', { timeout: 6 * PATIENCE }, () => {
  let fake, secretier
  let skipped = 0
  const now = performance.now.bind(performance)

  beforeEach(async () => {
    skipped = 0
    mock.method(performance, 'now', () => now() + skipped)
    fake = await new Fake().start()
    fake.secrets.set('acme/K', 'v')
    secretier = new Secretier({ url: fake.url, token: 't', cache: { maxAge: '60s', entries: 3 } })
  })
  afterEach(async () => {
    secretier.close()
    await fake.stop()
    mock.restoreAll()
  })

  const get = (key = 'K', tenant = 'acme') => secretier.get(tenant, key)

  /** Until the client has taken what was sent to it. */
  async function until(isSo, what) {
    const give = Date.now() + PATIENCE
    while (!(await isSo())) {
      assert.ok(Date.now() < give, what)
      await new Promise((resolve) => setTimeout(resolve, 2))
    }
  }

  /** A first get, which opens the stream, and the stream once it is followed. */
  async function following() {
    const opened = fake.nextStream()
    await get()
    const stream = await opened
    stream.says()
    await until(() => secretier.isFollowing, 'the stream is followed')
    await get()
    return stream
  }

  /** The number of requests that it takes. */
  async function cost(ask) {
    const before = fake.asked
    await ask()
    return fake.asked - before
  }

  test('a value is asked for once', async () => {
    await following()
    assert.equal(await cost(get), 0)
    assert.equal(await get(), 'v')
  })

  test('that there is none is known too', async () => {
    await following()
    assert.equal(await get('NONE'), null)
    assert.equal(await cost(async () => assert.equal(await get('NONE'), null)), 0)
  })

  test('a change is seen within a second, and costs its own key alone', async () => {
    const stream = await following()
    fake.secrets.set('acme/OTHER', 'o')
    await get('OTHER')
    fake.secrets.set('acme/K', 'w')
    const told = now()
    stream.changed('acme', 'K')
    await until(async () => (await get()) === 'w', 'the new value')
    assert.ok(now() - told < 1000)
    assert.equal(await cost(() => get('OTHER')), 0)
    stream.changed('globex', 'K')
    stream.says()
    assert.equal(await cost(get), 0)
  })

  test('a deletion and a creation are changes', async () => {
    const stream = await following()
    fake.secrets.delete('acme/K')
    stream.changed('acme', 'K')
    await until(async () => (await get()) === null, 'the deletion')
    fake.secrets.set('acme/K', 'again')
    stream.changed('acme', 'K')
    await until(async () => (await get()) === 'again', 'the creation')
  })

  test('a change that comes while a get is under way does not leave the old answer behind', async () => {
    const stream = await following()
    const held = fake.nextHeld()
    const before = get('A')
    const { response } = await held
    fake.secrets.set('acme/A', 'new')
    stream.changed('acme', 'A')
    await taken(stream)
    json(response, 200, { ...secret('old'), key: 'A' })
    assert.equal(await before, 'old')
    assert.equal(await get('A'), 'new')
    assert.equal(await cost(() => get('A')), 0)
  })

  test('a caller after a change does not join a request from before it, which ends later', async () => {
    const stream = await following()
    const held = fake.nextHeld()
    const before = get('A')
    const { response } = await held
    fake.secrets.set('acme/A', 'new')
    stream.changed('acme', 'A')
    await taken(stream)
    assert.equal(await within(get('A'), 'an answer'), 'new')
    json(response, 200, { ...secret('old'), key: 'A' })
    assert.equal(await before, 'old')
    assert.equal(await cost(async () => assert.equal(await get('A'), 'new')), 0)
  })

  test('the same holds of getMany, and of a reset', async () => {
    const stream = await following()
    for (const [key, tell] of [
      ['A', () => stream.changed('acme', 'A')],
      ['B', () => stream.send('event: reset\ndata:\n\n')],
    ]) {
      const held = fake.nextHeld()
      const before = secretier.getMany('acme', ['K', key])
      const { response } = await held
      fake.secrets.set(`acme/${key}`, 'new')
      tell()
      await taken(stream)
      json(response, 200, { secrets: [], missing: [key] })
      assert.deepEqual(await before, { K: 'v', [key]: null })
      assert.equal(await get(key), 'new')
    }
  })

  test('a write of one\'s own is read', async () => {
    await following()
    fake.next((_, response) => json(response, 200, { tenant: 'acme', key: 'K', version: 2 }))
    await secretier.set('acme', 'K', 'mine')
    fake.secrets.set('acme/K', 'mine')
    assert.equal(await get(), 'mine')
  })

  test('after a reset nothing is known', async () => {
    const stream = await following()
    fake.secrets.set('acme/K', 'w')
    stream.send('event: reset\nid: 2.0.0\ndata:\n\n')
    await until(async () => (await get()) === 'w', 'the new value')
  })

  test('a change that cannot be read is a reset', async () => {
    const stream = await following()
    fake.secrets.set('acme/K', 'w')
    stream.send('event: changed\ndata: {"tenant":\n\n')
    await until(async () => (await get()) === 'w', 'the new value')
  })

  test('an event of another kind is none', async () => {
    const stream = await following()
    stream.send('event: news\nid: 1.2.0\ndata: {"tenant":"acme","key":"K"}\n\n')
    await taken(stream)
    assert.equal(await cost(get), 0)
  })

  test('a value lives for maxAge while the stream is heard', async () => {
    const stream = await following()
    skipped += 59_000
    stream.says()
    await until(() => secretier.isFollowing, 'a word')
    assert.equal(await cost(get), 0)
    skipped += 2_000
    stream.says()
    await until(() => secretier.isFollowing, 'a word')
    assert.equal(await cost(get), 1)
  })

  test('after 4 s of silence a value lives for 5 s at most', async () => {
    await following()
    skipped += 3_900
    assert.equal(await cost(get), 0)
    skipped += 200
    assert.equal(secretier.isFollowing, false)
    assert.equal(await cost(get), 0)
    skipped += 1_000
    assert.equal(await cost(get), 1)
    assert.equal(await cost(get), 0)
    skipped += 5_100
    assert.equal(await cost(get), 1)
  })

  test('silence is broken off, and the stream goes on behind the last event', async () => {
    const stream = await following()
    stream.changed('acme', 'OTHER', '7.42.1')
    const next = fake.nextStream()
    const began = now()
    const again = await next
    assert.ok(now() - began > 3_500, 'after 4 s')
    assert.equal(stream.lastEventId, undefined)
    assert.equal(again.lastEventId, '7.42.1')
  })

  test('a stream that goes on keeps what is known, and tells what was missed', async () => {
    const stream = await following()
    fake.secrets.set('acme/OTHER', 'o')
    await get('OTHER')
    stream.changed('acme', 'NEITHER', '7.42.1')
    await taken(stream)
    await get('OTHER')
    const next = fake.nextStream()
    stream.end()
    const again = await next
    fake.secrets.set('acme/K', 'w')
    again.changed('acme', 'K', '7.43.0')
    again.says()
    await until(() => secretier.isFollowing, 'the stream is followed')
    assert.equal(await get(), 'w')
    assert.equal(await cost(() => get('OTHER')), 0)
  })

  test('a new stream that does not go on behind an event knows nothing of before', async () => {
    const stream = await following()
    const next = fake.nextStream()
    stream.end()
    await next
    fake.secrets.set('acme/K', 'w')
    await until(async () => (await get()) === 'w', 'the new value')
  })

  test('a server that refuses the stream is asked again, ever later', async () => {
    fake.refuseStreams = true
    const times = []
    await get()
    await until(() => {
      const streams = fake.requests.filter(({ path }) => path === '/v1/events').length
      if (streams > times.length) times.push(now())
      return times.length === 5
    }, 'five tries')
    const pauses = times.slice(1).map((time, i) => time - times[i])
    // Each is between one and two times 100, 200, 400 and 800 ms.
    for (const [i, pause] of pauses.entries()) assert.ok(pause > 90 * 2 ** i, pauses.join())
    fake.refuseStreams = false
    const stream = await fake.nextStream()
    stream.says()
    await until(() => secretier.isFollowing, 'the stream is followed')
  })

  test('no more entries are kept than allowed, those in use longest', async () => {
    await following()
    for (const key of ['A', 'B']) await get(key)
    await get('K')
    await get('C')
    assert.equal(await cost(() => get('K')), 0)
    assert.equal(await cost(() => get('C')), 0)
    assert.equal(await cost(() => get('B')), 0)
    assert.equal(await cost(() => get('A')), 1)
  })

  test('getMany asks for what is not known alone, and what it learns is known', async () => {
    await following()
    assert.deepEqual(await secretier.getMany('acme', ['K', 'A']), { K: 'v', A: null })
    assert.deepEqual(JSON.parse(fake.requests.at(-1).body), { keys: ['A'] })
    assert.equal(await cost(() => secretier.getMany('acme', ['A', 'K'])), 0)
    assert.equal(await cost(() => get('A')), 0)
  })

  test('an error is not kept', async () => {
    await following()
    fake.next((_, response) => response.writeHead(500).end())
    await assert.rejects(get('A'))
    assert.equal(await get('A'), null)
  })

  test('tenants do not share values', async () => {
    await following()
    fake.secrets.set('globex/K', 'g')
    assert.equal(await get('K', 'globex'), 'g')
    assert.equal(await get('K', 'acme'), 'v')
  })

  test('close ends the stream, and no other follows', async () => {
    const stream = await following()
    const closed = once(stream, 'close')
    secretier.close()
    await within(closed, 'the end of the stream')
    assert.equal(fake.streams.length, 0)
    await assert.rejects(get(), { code: 'closed' })
  })

  /** Until the client has taken all that was said before: its time goes on, and the next word is the first it hears. */
  async function taken(stream) {
    skipped += 4_100
    assert.equal(secretier.isFollowing, false)
    stream.says()
    await until(() => secretier.isFollowing, 'a word')
  }
})
