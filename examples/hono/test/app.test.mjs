// The three commands of the README, with ports that the system chooses.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import http from 'node:http'
import { createInterface } from 'node:readline'
import { after, before, describe, test } from 'node:test'
import { fileURLToPath } from 'node:url'

import { BIN, PATIENCE, dev, within } from '../../../clients/typescript/test/support.mjs'

describe('the example', { skip: BIN ? false : 'SECRETIER_BIN names no program', timeout: 4 * PATIENCE }, () => {
  let server, api, port
  let said = ''

  before(async () => {
    server = await dev()
    const env = { ...process.env, SECRETIER_URL: server.url, SECRETIER_TOKEN_FILE: server.tokenFile, PORT: '0' }
    const main = fileURLToPath(new URL('../dist/main.js', import.meta.url))
    api = spawn(process.execPath, [main], { env, stdio: ['ignore', 'pipe', 'pipe'] })
    for (const output of [api.stdout, api.stderr]) output.on('data', (text) => (said += text))
    const [line] = await within(once(createInterface({ input: api.stdout }), 'line'), 'the API, ready')
    port = /:(\d+)$/.exec(line)[1]
  })
  after(async () => {
    if (api?.exitCode === null) {
      api.kill()
      await within(once(api, 'exit'), 'the end of the API')
    }
    await server?.stop()
  })

  async function pay(host, body = '{"amount":1200,"currency":"eur"}') {
    const request = http.request({ port, host: '127.0.0.1', path: '/pay', method: 'POST', agent: false, headers: { host } })
    request.end(body)
    const [answer] = await within(once(request, 'response'), 'an answer')
    let text = ''
    for await (const piece of answer) text += piece
    return { status: answer.statusCode, ...JSON.parse(text) }
  }

  test('each tenant pays with a key of its own', async () => {
    const acme = await pay(`acme.localhost:${port}`)
    assert.equal(acme.status, 201)
    assert.match(acme.payment, /^pi_[0-9a-f]{24}$/)
    assert.deepEqual(await pay('acme.localhost'), acme)
    assert.notEqual((await pay('globex.localhost')).payment, acme.payment)
  })

  test('no tenant, an unknown one and a wrong payment are refused', async () => {
    assert.equal((await pay('127.0.0.1')).status, 404)
    assert.equal((await pay('nobody.localhost')).status, 404)
    assert.equal((await pay('acme.localhost', '{"amount":-1}')).status, 400)
    assert.equal((await pay('acme.localhost', 'no JSON')).status, 400)
  })

  test('without secretier it says so, and tells no secret', async () => {
    await server.stop()
    const { status, error } = await pay('initech.localhost')
    assert.equal(status, 503)
    assert.equal(error, 'payments cannot be taken just now')
    assert.doesNotMatch(said, /sk_test_|st[._]/)
  })
})
