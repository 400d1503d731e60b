// The middleware in the real Hono, before the real program.
import assert from 'node:assert/strict'
import { after, before, describe, test } from 'node:test'

import { serve as listen } from '@hono/node-server'
import { Hono } from 'hono'
import { Secretier, SecretierError } from 'secretier'
import { secrets } from 'secretier/hono'

import { BIN, PATIENCE, dev } from './support.mjs'

const subdomainOf = (host) => /^([a-z0-9-]+)\.example\.com$/.exec(host ?? '')?.[1]

/** A Secretier that tells what it is asked. */
const telling = { get: async (tenant, key) => `${tenant} ${key}` }

describe('the middleware', { timeout: PATIENCE }, () => {
  test('it gives the secrets of the request\'s tenant', async () => {
    const app = new Hono()
    app.use(secrets(telling, { tenant: (c) => subdomainOf(c.req.header('host')) }))
    app.get('/', async (c) => c.text(await c.var.secret('K')))
    const answer = await app.request('/', { headers: { host: 'acme.example.com' } })
    assert.equal(await answer.text(), 'acme K')
  })

  test('requests at once do not get each other\'s tenant', async () => {
    const app = new Hono()
    app.use(secrets(telling, { tenant: async (c) => subdomainOf(c.req.header('host')) }))
    app.get('/', async (c) => c.text(`${await c.var.secret('A')}, ${await c.var.secret('B')}`))
    const hosts = Array.from({ length: 50 }, (_, i) => `t${i}`)
    const answers = await Promise.all(
      hosts.map(async (host) => (await app.request('/', { headers: { host: `${host}.example.com` } })).text()),
    )
    assert.deepEqual(answers, hosts.map((host) => `${host} A, ${host} B`))
  })

  test('the tenant is asked for once a request, and only where a secret is', async () => {
    let asked = 0
    const app = new Hono()
    app.use(secrets(telling, { tenant: () => (asked++, 'acme') }))
    app.get('/health', (c) => c.text('ok'))
    app.get('/two', async (c) => c.text((await c.var.secret('A')) + (await c.var.secret('B'))))
    await app.request('/health')
    assert.equal(asked, 0)
    await app.request('/two')
    assert.equal(asked, 1)
  })

  test('no tenant is an error that says so, and nothing is asked', async () => {
    for (const tenant of [() => null, () => undefined, () => '', async () => undefined]) {
      const app = new Hono()
      app.use(secrets({ get: assert.fail }, { tenant }))
      app.get('/pay', async (c) => c.text(await c.var.secret('K')))
      let error
      app.onError((thrown, c) => ((error = thrown), c.text('failed', 500)))
      assert.equal((await app.request('/pay')).status, 500)
      assert.ok(error instanceof SecretierError)
      assert.equal(error.code, 'no_tenant')
      assert.match(error.message, /GET \/pay/)
    }
  })

  test('an error of telling the tenant is the request\'s', async () => {
    const app = new Hono()
    const tenant = () => {
      throw new Error('no such host')
    }
    app.use(secrets(telling, { tenant }))
    app.get('/', async (c) => c.text(await c.var.secret('K')))
    app.onError((error, c) => c.text(error.message, 500))
    assert.equal(await (await app.request('/')).text(), 'no such host')
  })
})

describe('an API before secretier dev', { skip: BIN ? false : 'SECRETIER_BIN names no program', timeout: 3 * PATIENCE }, () => {
  let server, secretier, api, url

  before(async () => {
    server = await dev()
    secretier = new Secretier({ url: server.url, tokenFile: server.tokenFile, cache: { maxAge: '60s', entries: 100 } })
    const app = new Hono()
    app.use(secrets(secretier, { tenant: (c) => c.req.header('x-tenant') }))
    app.get('/length', async (c) => c.json((await c.var.secret('STRIPE_SECRET_KEY'))?.length ?? null))
    await new Promise((resolve) => {
      api = listen({ fetch: app.fetch, port: 0, hostname: '127.0.0.1' }, ({ port }) => resolve((url = `http://127.0.0.1:${port}`)))
    })
  })
  after(async () => {
    api?.close()
    secretier?.close()
    await server?.stop()
  })

  test('each tenant has its own key, and a stranger none', async () => {
    const length = async (tenant) => (await fetch(`${url}/length`, { headers: { 'x-tenant': tenant } })).json()
    assert.deepEqual(await Promise.all(['acme', 'globex', 'nobody'].map(length)), [40, 40, null])
    assert.equal(await length('acme'), 40)
  })
})
