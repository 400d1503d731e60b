// The servers that the tests ask: the real program, and a fake for what the real one does rarely.
import { execFileSync, spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { EventEmitter, once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import http from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'

/** The program, or null where none was named: its tests are then left out. */
export const BIN = process.env.SECRETIER_BIN || null

/** No test waits longer for anything. */
export const PATIENCE = 10_000

/** The promise, or an error that says what did not happen in time. */
export async function within(promise, what, milliseconds = PATIENCE) {
  let timer
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`in ${milliseconds} ms, there was not: ${what}`)), milliseconds)
  })
  try {
    return await Promise.race([promise, late])
  } finally {
    clearTimeout(timer)
  }
}

/** `secretier dev`: the tenants acme, globex and initech, and a token that may do everything. */
export async function dev() {
  const folder = mkdtempSync(join(tmpdir(), 'secretier-'))
  const args = ['dev', '--json', '--listen', '127.0.0.1:0', '--data-dir', folder]
  const { line, stop } = await started(args, folder, (line) => line.startsWith('{'))
  return { ...JSON.parse(line), tokenFile: join(folder, 'token'), folder, stop }
}

/** `secretier serve` on a port and on a Unix socket, with an empty database of its own. */
export async function serve() {
  const folder = mkdtempSync(join(tmpdir(), 'secretier-'))
  const at = (name) => join(folder, name)
  writeFileSync(at('master.key'), randomBytes(32).toString('hex'), { mode: 0o600 })
  writeFileSync(
    at('secretier.toml'),
    `environment = "dev"
    phase = "database"
    [server]
    listen = "127.0.0.1:0"
    unix_socket = "${at('socket')}"
    [database]
    url = "sqlite:${at('secretier.db')}"
    [keys]
    sources = ["file:${at('master.key')}"]`,
  )
  const config = ['--config', at('secretier.toml')]
  const token = (verb, name, ...more) => execFileSync(BIN, ['token', verb, name, ...more, ...config], { stdio: 'ignore' })
  const scope = ['--tenants', '*', '--actions', 'read,write', '--file', at('token')]
  token('create', '--name', 'test', ...scope)
  const { line, stop } = await started(['serve', ...config], folder, (line) => line.includes('serving address='))
  return {
    url: `http://${/address=(\S+)/.exec(line)[1]}`,
    socketPath: at('socket'),
    tokenFile: at('token'),
    token: readFileSync(at('token'), 'utf8').trim(),
    /** Writes another token to the file; the old one ends. */
    rotate: () => token('rotate', 'test', '--grace', '0s', '--file', at('token')),
    stop,
  }
}

async function started(args, folder, isReady) {
  const program = spawn(BIN, args, { stdio: ['ignore', 'pipe', 'pipe'] })
  const said = []
  const ready = new Promise((resolve, reject) => {
    for (const input of [program.stdout, program.stderr]) {
      createInterface({ input }).on('line', (line) => (isReady(line) ? resolve(line) : said.push(line)))
    }
    program.once('error', reject)
    program.once('exit', (code) => reject(new Error(`secretier ${args[0]} ended with ${code}: ${said.join('\n')}`)))
  })
  const stop = async () => {
    if (program.exitCode === null) {
      const exit = once(program, 'exit')
      program.kill()
      await within(exit, 'the end of secretier')
    }
    rmSync(folder, { recursive: true, force: true })
  }
  try {
    return { line: await within(ready, `secretier ${args[0]}, ready`), stop }
  } catch (error) {
    await stop()
    throw error
  }
}

/** A server that answers as a test tells it. */
export class Fake extends EventEmitter {
  /** The requests so far: method, path, headers, body. */
  requests = []
  /** Streams of /v1/events that are open. */
  streams = []
  /** The secrets: 'tenant/key' to value. */
  secrets = new Map()
  #answers = []
  #server = http.createServer((request, response) => this.#answer(request, response))

  async start() {
    this.#server.listen(0, '127.0.0.1')
    await once(this.#server, 'listening')
    this.url = `http://127.0.0.1:${this.#server.address().port}`
    return this
  }

  async stop() {
    this.#server.closeAllConnections()
    this.#server.close()
    await once(this.#server, 'close')
  }

  /** The next request but those for the stream is answered so; without this, from `secrets`. */
  next(answer) {
    this.#answers.push(answer)
  }

  /** The number of requests but those for the stream. */
  get asked() {
    return this.requests.filter(({ path }) => path !== '/v1/events').length
  }

  /** The next stream that is opened, which has said its first word. */
  async nextStream() {
    const [stream] = await within(once(this, 'stream'), 'a stream')
    return stream
  }

  /** The next request that is to be answered by hand. */
  async nextHeld() {
    const hold = new Promise((resolve) => this.next((request, response) => resolve({ request, response })))
    return within(hold, 'a request')
  }

  async #answer(request, response) {
    let body = ''
    for await (const piece of request) body += piece
    const { method, url: path, headers } = request
    this.requests.push({ method, path, headers, body })
    if (path === '/v1/events') return this.#stream(request, response)
    const answer = this.#answers.shift() ?? ((request, response) => this.fromSecrets(request, response))
    answer({ method, path, headers, body }, response)
  }

  #stream(request, response) {
    if (this.refuseStreams) return problem(response, 503, 'unavailable')
    const stream = new EventEmitter()
    stream.lastEventId = request.headers['last-event-id']
    stream.send = (text) => response.write(text)
    stream.says = () => response.write(': still here\n\n')
    stream.changed = (tenant, key, id = '1.1.0') =>
      response.write(`event: changed\nid: ${id}\ndata: ${JSON.stringify({ tenant, key, version: 2, etag: '"e"' })}\n\n`)
    stream.end = () => response.destroy()
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.flushHeaders()
    this.streams.push(stream)
    response.on('close', () => {
      this.streams.splice(this.streams.indexOf(stream), 1)
      stream.emit('close')
    })
    this.emit('stream', stream)
  }

  fromSecrets({ path, body }, response) {
    const [, , , tenant, , key] = path.split('/').map(decodeURIComponent)
    const found = (key) => {
      const value = this.secrets.get(`${tenant}/${key}`)
      return value === undefined ? [] : [{ tenant, key, value, version: 1 }]
    }
    if (key === 'batch-get') {
      const { keys } = JSON.parse(body)
      const missing = keys.filter((key) => found(key).length === 0)
      return json(response, 200, { secrets: keys.flatMap(found), missing })
    }
    const [secret] = found(key)
    secret ? json(response, 200, secret) : problem(response, 404, 'secret_not_found')
  }
}

export function json(response, status, body, headers = {}) {
  response.writeHead(status, { 'content-type': 'application/json', ...headers })
  response.end(JSON.stringify(body))
}

export function problem(response, status, code, headers = {}) {
  response.writeHead(status, { 'content-type': 'application/problem+json', 'x-request-id': 'r-1', ...headers })
  response.end(JSON.stringify({ title: 'Title', status, code, detail: 'do something else' }))
}
