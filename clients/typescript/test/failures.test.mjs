// Against a fake: refusals, silence, broken connections, and what may be seen of a secret meanwhile.
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, afterEach, before, beforeEach, describe, test } from 'node:test'
import { promisify, inspect } from 'node:util'

import { Secretier, SecretierError } from 'secretier'

import { Fake, PATIENCE, json, problem, within } from './support.mjs'

const secret = (value) => ({ tenant: 'acme', key: 'K', value, version: 1 })

describe('failures', { timeout: 6 * PATIENCE }, () => {
  let fake, secretier, folder, tokenFile

  before(() => {
    folder = mkdtempSync(join(tmpdir(), 'secretier-'))
    tokenFile = join(folder, 'token')
  })
  after(() => rmSync(folder, { recursive: true }))
  beforeEach(async () => {
    fake = await new Fake().start()
    fake.secrets.set('acme/K', 'v')
    writeFileSync(tokenFile, 'one\n')
    secretier = new Secretier({ url: fake.url, tokenFile, timeout: '3s' })
  })
  afterEach(async () => {
    secretier.close()
    await fake.stop()
  })

  const refuse = (code, headers) => (_, response) => problem(response, ...code, headers)

  test('null means proved absent: every other 404 is an error', async () => {
    fake.next(refuse([404, 'route_not_found']))
    await assert.rejects(secretier.get('acme', 'K'), { code: 'route_not_found', status: 404, requestId: 'r-1' })
    fake.next((_, response) => json(response, 404, { code: 'secret_not_found' }))
    await assert.rejects(secretier.get('acme', 'K'), { code: 'invalid_answer', status: 404 })
    fake.next(refuse([404, 'secret_not_found']))
    assert.equal(await secretier.get('acme', 'K'), null)
  })

  test('after a 401 the token file is read once more', async () => {
    fake.next((request, response) => {
      assert.equal(request.headers.authorization, 'Bearer one')
      writeFileSync(tokenFile, 'two\n')
      problem(response, 401, 'token_invalid')
    })
    assert.equal(await secretier.get('acme', 'K'), 'v')
    assert.equal(fake.requests.at(-1).headers.authorization, 'Bearer two')
    assert.equal(fake.asked, 2)
  })

  test('a file with the same token is not tried again', async () => {
    fake.next(refuse([401, 'token_expired']))
    await assert.rejects(secretier.get('acme', 'K'), { code: 'token_expired' })
    assert.equal(fake.asked, 1)
  })

  test('a second 401 is the answer', async () => {
    fake.next((_, response) => {
      writeFileSync(tokenFile, 'two')
      problem(response, 401, 'token_invalid')
    })
    fake.next((_, response) => {
      writeFileSync(tokenFile, 'three')
      problem(response, 401, 'token_invalid')
    })
    await assert.rejects(secretier.get('acme', 'K'), { code: 'token_invalid' })
    assert.equal(fake.asked, 2)
  })

  test('after 429 and 503 it asks again when it is told to', async () => {
    for (const code of [[429, 'rate_limited'], [503, 'unavailable']]) {
      fake.next(refuse(code, { 'retry-after': '1' }))
      const begun = performance.now()
      assert.equal(await secretier.get('acme', 'K'), 'v')
      assert.ok(performance.now() - begun >= 990)
    }
  })

  test('a pause beyond the deadline is not begun', async () => {
    fake.next(refuse([503, 'upstream_denied'], { 'retry-after': '30' }))
    const begun = performance.now()
    await assert.rejects(secretier.get('acme', 'K'), { code: 'upstream_denied', status: 503, retryAfter: 30 })
    assert.ok(performance.now() - begun < 1000)
  })

  test('a write under a condition is not repeated after a 503, which may have done it', async () => {
    fake.next(refuse([503, 'unavailable'], { 'retry-after': '1' }))
    await assert.rejects(secretier.set('acme', 'K', 'w', { ifMatch: '"e"' }), { code: 'unavailable' })
    assert.equal(fake.asked, 1)
    assert.equal(fake.requests[0].headers['if-match'], '"e"')
  })

  test('an answer that does not come ends with the deadline', async () => {
    const hasty = new Secretier({ url: fake.url, token: 't', timeout: 100 })
    fake.next(() => {})
    await assert.rejects(within(hasty.get('acme', 'K'), 'the deadline'), { code: 'timeout' })
    fake.next((_, response) => response.writeHead(200).write('{"ten'))
    await assert.rejects(within(hasty.get('acme', 'K'), 'the deadline'), { code: 'timeout' })
    hasty.close()
  })

  test('no server is an error that says so', async () => {
    const { url } = fake
    await fake.stop()
    const lost = new Secretier({ url, token: 't' })
    await assert.rejects(lost.get('acme', 'K'), { code: 'unreachable', status: undefined })
    const nowhere = new Secretier({ socketPath: join(folder, 'none'), token: 't' })
    await assert.rejects(nowhere.get('acme', 'K'), { code: 'unreachable' })
    await fake.start()
  })

  test('a kept connection that the server closes at the wrong moment costs a read nothing', async () => {
    assert.equal(await secretier.get('acme', 'K'), 'v')
    fake.next((_, response) => response.socket.destroy())
    assert.equal(await secretier.get('acme', 'K'), 'v')
    assert.equal(fake.asked, 3)
  })

  test('a write takes no kept connection, and is not repeated', async () => {
    assert.equal(await secretier.get('acme', 'K'), 'v')
    assert.equal(fake.requests[0].headers.connection, 'keep-alive')
    fake.next((_, response) => response.socket.destroy())
    await assert.rejects(secretier.set('acme', 'K', 'w'), { code: 'unreachable' })
    assert.equal(fake.requests[1].headers.connection, 'close')
    assert.equal(fake.asked, 2)
  })

  test('an answer that breaks off is no answer', async () => {
    fake.next((_, response) => {
      response.writeHead(200, { 'content-length': '1000' })
      response.write('{"tenant":"acme"', () => response.socket.destroy())
    })
    await assert.rejects(within(secretier.get('acme', 'K'), 'an end'), { code: 'unreachable' })
  })

  test('another tenant\'s secret is never taken for this one\'s', async () => {
    fake.next((_, response) => json(response, 200, { ...secret('stolen'), tenant: 'globex' }))
    await assert.rejects(secretier.get('acme', 'K'), { code: 'invalid_answer' })
    fake.next((_, response) => json(response, 200, { secrets: [{ ...secret('stolen'), tenant: 'globex' }], missing: [] }))
    await assert.rejects(secretier.getMany('acme', ['K']), { code: 'invalid_answer' })
  })

  test('an answer that says nothing of a secret does not make it absent', async () => {
    for (const body of ['', 'null', '[]', '{}', '"v"', '{"secrets":[],"missing":[]}', '{"secrets":[],"missing":["L"]}']) {
      const nothing = (_, response) => response.writeHead(200).end(body)
      for (const ask of [secretier.get, secretier.read]) {
        fake.next(nothing)
        await assert.rejects(ask.call(secretier, 'acme', 'K'), { code: 'invalid_answer' }, body)
      }
      fake.next(nothing)
      await assert.rejects(secretier.getMany('acme', ['K']), { code: 'invalid_answer' }, body)
      fake.next(nothing)
      await assert.rejects(secretier.list('acme'), { code: 'invalid_answer' }, body)
    }
  })

  test('callers who ask for the same at once share a request', async () => {
    const held = fake.nextHeld()
    const callers = [1, 2, 3].map(() => secretier.get('acme', 'K'))
    json((await held).response, 200, secret('shared'))
    assert.deepEqual(await Promise.all(callers), ['shared', 'shared', 'shared'])
    assert.equal(fake.asked, 1)
    assert.equal(await secretier.get('acme', 'K'), 'v')
  })

  test('a caller after a write does not share a request from before it', async () => {
    const held = fake.nextHeld()
    const before = secretier.get('acme', 'K')
    const { response } = await held
    fake.next((_, response) => json(response, 200, { tenant: 'acme', key: 'K', version: 2 }))
    await secretier.set('acme', 'K', 'w')
    fake.secrets.set('acme/K', 'w')
    assert.equal(await secretier.get('acme', 'K'), 'w')
    json(response, 200, secret('v'))
    assert.equal(await before, 'v')
  })

  test('one caller\'s signal ends its call alone, the last one\'s the request', async () => {
    const held = fake.nextHeld()
    const [one, two] = [new AbortController(), new AbortController()]
    const calls = [one, two].map(({ signal }) => secretier.get('acme', 'K', { signal }))
    const { response } = await held
    const closed = once(response, 'close')
    one.abort(new Error('enough'))
    await assert.rejects(calls[0], { message: 'enough' })
    assert.equal(response.destroyed, false)
    two.abort()
    await assert.rejects(calls[1], { name: 'AbortError' })
    await within(closed, 'the end of the request')
    await assert.rejects(secretier.get('acme', 'K', { signal: AbortSignal.abort() }), { name: 'AbortError' })
    assert.equal(fake.asked, 1)
  })

  test('a signal ends every call, and a pause before the next try', async () => {
    const calls = {
      getMany: (signal) => secretier.getMany('acme', ['K'], { signal }),
      read: (signal) => secretier.read('acme', 'K', { signal }),
      list: (signal) => secretier.list('acme', { signal }),
      set: (signal) => secretier.set('acme', 'K', 'w', { signal }),
      delete: (signal) => secretier.delete('acme', 'K', { signal }),
    }
    for (const call of Object.values(calls)) {
      const held = fake.nextHeld()
      const given = new AbortController()
      const ended = assert.rejects(call(given.signal), { name: 'AbortError' })
      await held
      given.abort()
      await within(ended, 'the end of the call')
    }
    const given = new AbortController()
    fake.next((_, response) => {
      problem(response, 503, 'unavailable', { 'retry-after': '2' })
      response.on('close', () => setTimeout(() => given.abort(), 20))
    })
    const begun = performance.now()
    await assert.rejects(secretier.list('acme', { signal: given.signal }), { name: 'AbortError' })
    assert.ok(performance.now() - begun < 1000)
  })

  test('close ends what is under way, and what comes later', async () => {
    const held = fake.nextHeld()
    const call = secretier.get('acme', 'K')
    await held
    secretier.close()
    await assert.rejects(within(call, 'the end of the call'), { code: 'closed' })
    await assert.rejects(secretier.get('acme', 'K'), { code: 'closed' })
    await assert.rejects(secretier.set('acme', 'K', 'v'), { code: 'closed' })
  })

  test('neither the client nor an error shows a token or a value', async () => {
    const cached = new Secretier({ url: fake.url, token: 'tok3n', cache: { maxAge: '60s', entries: 10 } })
    fake.secrets.set('acme/K', 'pa55')
    assert.equal(await cached.get('acme', 'K'), 'pa55')
    const seen = [inspect(cached, { depth: 9, showHidden: true }), JSON.stringify(cached), String(cached)]
    const answers = [
      (_, response) => response.writeHead(200).end('pa55 tok3n'),
      (_, response) => response.writeHead(200).end('{"tenant":"acme","value":"pa55"}'),
      (_, response) => response.writeHead(500).end('pa55 tok3n'),
      (_, response) => response.socket.end('HTTP/1.1 200 OK\r\nContent-Length: pa55\r\n\r\npa55'),
    ]
    for (const answer of answers) {
      fake.next(answer)
      const error = await cached.read('acme', 'K').catch((error) => error)
      assert.ok(error instanceof SecretierError)
      seen.push(inspect(error, { depth: 9, showHidden: true }), JSON.stringify(error))
    }
    for (const options of [{ url: 'http://u:pa55@h' }, { url: 'pa55' }, { url: fake.url, token: 'pa55\n' }]) {
      assert.throws(() => new Secretier(options), (error) => seen.push(inspect(error, { depth: 9 })) > 0)
    }
    for (const text of seen) assert.doesNotMatch(text, /pa55|tok3n/)
    cached.close()
  })

  test('options that cannot be meant are errors at once', () => {
    const wrong = [
      {},
      { url: fake.url, socketPath: '/s' },
      { url: 'ftp://127.0.0.1' },
      { url: `${fake.url}/v1` },
      { url: fake.url, token: 't', tokenFile },
      { url: fake.url, timeout: 0 },
      { url: fake.url, timeout: '5 minutes' },
      { url: fake.url, cache: { maxAge: '60s', entries: 0 } },
      { url: fake.url, cache: { maxAge: 'x', entries: 1 } },
    ]
    for (const options of wrong) assert.throws(() => new Secretier(options), { code: 'invalid_option' })
    assert.throws(() => new Secretier({ url: fake.url, tokenFile: join(folder, 'none') }), { code: 'token_unreadable' })
    assert.throws(() => new Secretier({ url: fake.url, token: 'two words' }), { code: 'token_unreadable' })
  })

  test('a client with open connections and a stream lets its process end', async () => {
    fake.on('stream', (stream) => stream.says())
    const program = `
      import { Secretier } from 'secretier'
      const secretier = new Secretier({ url: '${fake.url}', token: 't', cache: { maxAge: '60s', entries: 10 } })
      await secretier.get('acme', 'K')
      while (!secretier.isFollowing) await new Promise((resolve) => setTimeout(resolve, 10))
      console.log('following')`
    const file = new URL('ends.tmp.mjs', import.meta.url)
    writeFileSync(file, program)
    const args = process.versions.deno ? ['run', '-A', file.pathname] : [file.pathname]
    try {
      const { stdout } = await promisify(execFile)(process.execPath, args, { timeout: PATIENCE })
      assert.equal(stdout.trim(), 'following')
    } finally {
      rmSync(file)
    }
  })

  test('CommonJS gets the same', async () => {
    const { createRequire } = await import('node:module')
    const { Secretier } = createRequire(import.meta.url)('secretier')
    const common = new Secretier({ url: fake.url, token: 't' })
    assert.equal(await common.get('acme', 'K'), 'v')
    common.close()
  })
})
