// Against the real program: what it answers is what the client expects.
import assert from 'node:assert/strict'
import { readFileSync, writeFileSync } from 'node:fs'
import { after, before, describe, test } from 'node:test'

import { Secretier, SecretierError } from 'secretier'

import { BIN, PATIENCE, dev, serve } from './support.mjs'

const skip = BIN ? false : 'SECRETIER_BIN names no program'

describe('secretier dev', { skip, timeout: 6 * PATIENCE }, () => {
  let server, secretier

  before(async () => {
    server = await dev()
    secretier = new Secretier({ url: server.url, tokenFile: server.tokenFile })
  })
  after(async () => {
    secretier?.close()
    await server?.stop()
  })

  test('a secret is its value', async () => {
    assert.match(await secretier.get('acme', 'STRIPE_SECRET_KEY'), /^sk_test_[0-9a-f]{32}$/)
  })

  test('an absent secret and an absent tenant are null', async () => {
    assert.equal(await secretier.get('acme', 'NO_SUCH_KEY'), null)
    assert.equal(await secretier.get('nobody', 'STRIPE_SECRET_KEY'), null)
    assert.equal(await secretier.read('acme', 'NO_SUCH_KEY'), null)
    assert.equal(await secretier.list('nobody'), null)
  })

  test('a shared folder is named with a slash, and is no tenant of that name', async () => {
    assert.match(await secretier.get('/hono-api', 'SESSION_SECRET'), /^[0-9a-f]{64}$/)
    assert.equal(await secretier.get('hono-api', 'SESSION_SECRET'), null)
    assert.deepEqual((await secretier.list('/hono-api')).keys.map(({ key }) => key), ['SENTRY_DSN', 'SESSION_SECRET'])
    assert.equal((await secretier.getMany('/hono-api', ['NO_SUCH_KEY'])).NO_SUCH_KEY, null)
    const keeping = new Secretier({ url: server.url, tokenFile: server.tokenFile, cache: { maxAge: '1h' } })
    await keeping.get('/hono-api', 'ADDED')
    await secretier.set('/hono-api', 'ADDED', 'one')
    const end = performance.now() + PATIENCE
    while ((await keeping.get('/hono-api', 'ADDED')) !== 'one') {
      assert.ok(performance.now() < end, 'it takes too long until the new value is read')
      await new Promise((resolve) => setTimeout(resolve, 5))
    }
    keeping.close()
    assert.equal(await secretier.delete('/hono-api', 'ADDED'), true)
    for (const name of ['/', '//a', '/a/b']) {
      await assert.rejects(secretier.get(name, 'A'), { code: 'invalid_tenant' })
    }
  })

  test('many are one object, with null for what is absent', async () => {
    const many = await secretier.getMany('acme', ['STRIPE_SECRET_KEY', 'NO_SUCH_KEY', 'NO_SUCH_KEY', '__proto__'])
    assert.deepEqual(Object.keys(many), ['STRIPE_SECRET_KEY', 'NO_SUCH_KEY', '__proto__'])
    assert.match(many.STRIPE_SECRET_KEY, /^sk_test_/)
    assert.equal(many.NO_SUCH_KEY, null)
    assert.deepEqual(await secretier.getMany('acme', []), {})
  })

  test('a list has keys and versions, and no values', async () => {
    const { keys, unavailable } = await secretier.list('globex')
    assert.deepEqual(keys.map(({ key }) => key), ['DATABASE_URL', 'JWT_SECRET', 'SMTP_PASSWORD', 'STRIPE_SECRET_KEY', 'WEBHOOK_SECRET'])
    assert.deepEqual(Object.keys(keys[0]).sort(), ['key', 'updatedAt', 'version'])
    assert.ok(!Number.isNaN(Date.parse(keys[0].updatedAt)))
    assert.deepEqual(unavailable, [])
  })

  test('a value kept in the process is the new one soon after another client has written it', async () => {
    const keeping = new Secretier({ url: server.url, tokenFile: server.tokenFile, cache: { maxAge: '1h' } })
    // Each turn of the wait lets the stream be read; a value that is never replaced fails it.
    const until = async (condition, what) => {
      const end = performance.now() + PATIENCE
      while (!(await condition())) {
        assert.ok(performance.now() < end, `it takes too long until ${what}`)
        await new Promise((resolve) => setTimeout(resolve, 5))
      }
    }
    try {
      await secretier.set('initech', 'KEPT', 'one')
      assert.equal(await keeping.get('initech', 'KEPT'), 'one')
      await until(() => keeping.isFollowing, 'the client follows')
      for (const value of ['two', 'three']) {
        await keeping.get('initech', 'KEPT')
        await secretier.set('initech', 'KEPT', value)
        await until(async () => (await keeping.get('initech', 'KEPT')) === value, `${value} is served`)
      }
      await secretier.delete('initech', 'KEPT')
      await until(async () => (await keeping.get('initech', 'KEPT')) === null, 'it is gone')
    } finally {
      keeping.close()
    }
  })

  test('every value that is valid while a secret is rotated is told, the current one first', async () => {
    assert.equal(await secretier.valid('initech', 'NO_SUCH_KEY'), null)
    await secretier.set('initech', 'SIGNING', 'one')
    const one = { value: 'one', version: 1, stage: 'current', validUntil: null }
    assert.deepEqual(await secretier.valid('initech', 'SIGNING'), [one])
    const authorization = `Bearer ${readFileSync(server.tokenFile, 'utf8').trim()}`
    const answer = await fetch(`${server.url}/v1/tenants/initech/secrets/SIGNING/rotate`, {
      method: 'POST', headers: { authorization, 'content-type': 'application/json' }, body: '{"value":"two","grace":"1h"}',
    })
    assert.equal(answer.status, 202)
    const end = performance.now() + PATIENCE
    let valid
    do {
      assert.ok(performance.now() < end, 'it takes too long until the new value has taken over')
      valid = await secretier.valid('initech', 'SIGNING')
      // It takes over a moment before its end is noted.
    } while (!valid[1]?.validUntil)
    assert.deepEqual(valid.map(({ value, stage }) => [value, stage]), [['two', 'current'], ['one', 'previous']])
    assert.ok(Date.parse(valid[1].validUntil) > Date.now())
  })

  test('a write under a condition is done only where it holds', async () => {
    const { etag } = await secretier.set('initech', 'CAS', 'one', { ifNoneMatch: '*' })
    await assert.rejects(secretier.set('initech', 'CAS', 'two', { ifNoneMatch: '*' }), { code: 'version_conflict', status: 409 })
    assert.deepEqual(await secretier.read('initech', 'CAS'), { value: 'one', version: 1, etag })
    const second = await secretier.set('initech', 'CAS', 'two', { ifMatch: etag })
    await assert.rejects(secretier.set('initech', 'CAS', 'three', { ifMatch: etag }), { code: 'version_conflict' })
    await assert.rejects(secretier.delete('initech', 'CAS', { ifMatch: etag }), { code: 'version_conflict' })
    assert.equal(await secretier.delete('initech', 'CAS', { ifMatch: second.etag }), true)
  })

  test('a tenant is made only on demand', async () => {
    await assert.rejects(secretier.set('newcomer', 'K', 'v'), { code: 'tenant_unknown', status: 404 })
    await secretier.set('newcomer', 'K', 'v', { createTenant: true })
    assert.equal(await secretier.get('newcomer', 'K'), 'v')
  })

  test('an error has the code, the status and the id on record', async () => {
    const error = await secretier.get('No Tenant', 'K').catch((error) => error)
    assert.ok(error instanceof SecretierError && error instanceof Error)
    assert.equal(error.name, 'SecretierError')
    assert.equal(error.code, 'invalid_tenant')
    assert.equal(error.status, 400)
    assert.match(error.requestId, /^[0-9a-f-]{36}$/)
  })

  test('names that a path would swallow are errors', async () => {
    for (const name of ['.', '..', '', '\ud800', undefined]) {
      await assert.rejects(secretier.get('acme', name), { code: 'invalid_key' })
      await assert.rejects(secretier.get(name, 'K'), { code: 'invalid_tenant' })
    }
  })

  test('a wrong token is an error, not an absent secret', async () => {
    const stranger = new Secretier({ url: server.url, token: 'st.wrong' })
    await assert.rejects(stranger.get('acme', 'STRIPE_SECRET_KEY'), { code: 'token_invalid', status: 401 })
    stranger.close()
  })

  test('a cache works with a server that tells no changes', async () => {
    const cached = new Secretier({ url: server.url, token: server.token, cache: { maxAge: '60s', entries: 10 } })
    assert.equal(await cached.get('acme', 'JWT_SECRET'), await secretier.get('acme', 'JWT_SECRET'))
    assert.equal(await cached.get('acme', 'JWT_SECRET'), await secretier.get('acme', 'JWT_SECRET'))
    cached.close()
  })
})

describe('secretier serve', { skip, timeout: 6 * PATIENCE }, () => {
  let server
  before(async () => (server = await serve()))
  after(() => server?.stop())

  test('the Unix socket answers as the port does', async () => {
    const { socketPath, tokenFile, url } = server
    const [overUnix, overTcp] = [new Secretier({ socketPath, tokenFile }), new Secretier({ url, tokenFile })]
    await overUnix.set('acme', 'K', 'v', { createTenant: true })
    assert.equal(await overUnix.get('acme', 'K'), 'v')
    assert.equal(await overTcp.get('acme', 'K'), 'v')
    overUnix.close()
    overTcp.close()
  })

  test('a written value is read, by any name and with any text', async () => {
    const secretier = new Secretier({ url: server.url, tokenFile: server.tokenFile })
    await secretier.set('initech', 'K', 'v', { createTenant: true })
    for (const key of ['a b', 'with/slash', 'A#old', 'a?b=c', '%2e', 'ключ', '...', 'batch-get', "it's (*)!"]) {
      const value = `\ufeff${key}\u2028"\\ \u{1f511}`.repeat(3)
      assert.ok((await secretier.set('initech', key, value)).etag, key)
      assert.equal(await secretier.get('initech', key), value, key)
      assert.deepEqual(await secretier.getMany('initech', [key]), { [key]: value }, key)
      assert.equal(await secretier.delete('initech', key), true, key)
      assert.equal(await secretier.get('initech', key), null, key)
      assert.equal(await secretier.delete('initech', key), false, key)
    }
    secretier.close()
  })

  test('a token that was rotated is read again, by all callers who meet it at once', async () => {
    const secretier = new Secretier({ url: server.url, tokenFile: server.tokenFile })
    await secretier.set('acme', 'K', 'v', { createTenant: true })
    const before = readFileSync(server.tokenFile, 'utf8')
    server.rotate()
    assert.notEqual(readFileSync(server.tokenFile, 'utf8'), before)
    // The server hears of it within a second. Until then the old token is good, from then on the new one is.
    const old = new Secretier({ url: server.url, token: before.trim() })
    const until = performance.now() + PATIENCE
    for (let isGood = true; isGood; ) {
      isGood = await old.get('acme', 'K').then(() => true, ({ status }) => status !== 401)
      const all = await Promise.all(['K', 'L', 'M'].map((key) => secretier.get('acme', key)))
      assert.deepEqual(all, ['v', null, null])
      assert.ok(performance.now() < until, 'the old token ends')
    }
    old.close()
    writeFileSync(server.tokenFile, before)
    const late = new Secretier({ url: server.url, tokenFile: server.tokenFile })
    await assert.rejects(late.get('acme', 'K'), { status: 401 })
    secretier.close()
    late.close()
  })
})
