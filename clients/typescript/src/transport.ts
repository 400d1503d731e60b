// HTTP over kept-alive connections. Nothing above this file knows node:http.
//
// Bun and Deno have node:http too. It is used there as well: their fetch keeps a process alive for as long as a stream
// is read, knows no common way to a Unix socket, and gains a fifth at most of a request's time.

import http from 'node:http'
import https from 'node:https'
import { clearTimeout, setTimeout } from 'node:timers'

import { SecretierError } from './errors.js'
import { Deadlines } from './time.js'

export interface Request {
  method: 'GET' | 'POST' | 'PUT' | 'DELETE'
  path: string
  headers?: Record<string, string>
  body?: string
  /** Whether it changes nothing, so that it may be sent twice. */
  isRead: boolean
}

export interface Answer {
  status: number
  body: string
  header(name: string): string | undefined
}

export interface Stream {
  status: number
  header(name: string): string | undefined
  /** The body as it comes. Is empty unless the status is 200. */
  text: AsyncIterable<string>
  close(): void
}

/** Kept connections at once; more readers wait for one of them. The server takes 512 requests of one token. */
const CONNECTIONS = 128

export class Transport {
  #kept: http.Agent
  #single: http.Agent
  #request: typeof http.request
  #target: http.RequestOptions
  #address: string
  #host: string
  #deadlines = new Deadlines()
  #isClosed = false

  constructor(url: string | undefined, socketPath: string | undefined) {
    if ((url === undefined) === (socketPath === undefined)) {
      throw new SecretierError('invalid_option', 'one of url and socketPath is needed')
    }
    const parsed = url === undefined ? undefined : parse(url)
    const { Agent, request } = parsed?.protocol === 'https:' ? https : http
    this.#kept = new Agent({ keepAlive: true, maxSockets: CONNECTIONS })
    this.#single = new Agent({ keepAlive: false })
    this.#request = request
    this.#target = parsed ? { hostname: parsed.hostname.replace(/^\[|\]$/g, ''), port: parsed.port } : { socketPath }
    this.#host = parsed?.host ?? 'localhost'
    this.#address = parsed?.origin ?? `the socket ${socketPath}`
  }

  /** Sends a request, and gives the whole answer. `deadline` is a time of `performance.now()`. */
  send(request: Request, authorization: string | undefined, deadline: number, signal?: AbortSignal): Promise<Answer> {
    return new Promise((resolve, reject) => {
      let sent: http.ClientRequest | undefined
      let isOver = false
      const end = (answer: Answer | undefined, error?: unknown) => {
        isOver = true
        this.#deadlines.delete(waiting)
        signal?.removeEventListener('abort', abort)
        answer ? resolve(answer) : reject(error)
      }
      const giveUp = (error: unknown) => {
        end(undefined, error)
        sent?.destroy()
      }
      const abort = () => giveUp(signal?.reason)
      const late = () => giveUp(new SecretierError('timeout', `no answer from ${this.#address} in time`))
      const waiting = { deadline, late }
      const attempt = () => {
        sent = this.#exchange(request, authorization, (answer, error, wasIdle) => {
          wasIdle && !isOver ? attempt() : end(answer, error)
        })
      }

      if (signal?.aborted) return abort()
      if (this.#isClosed) return giveUp(this.#broken())
      signal?.addEventListener('abort', abort, { once: true })
      this.#deadlines.add(waiting)
      attempt()
    })
  }

  /** Opens a stream on a connection of its own, which does not keep the process alive. */
  open(request: Request, authorization: string | undefined, timeout: number, signal: AbortSignal): Promise<Stream> {
    return new Promise((resolve, reject) => {
      const outgoing = this.#begin(request, authorization, this.#single)
      const close = () => outgoing.destroy()
      const timer = setTimeout(close, timeout).unref()
      signal.addEventListener('abort', close, { once: true })
      outgoing.on('socket', (socket) => socket.unref())
      outgoing.on('response', (message) => {
        clearTimeout(timer)
        message.setEncoding('utf8')
        resolve({ ...headOf(message), text: message, close })
        if (message.statusCode !== 200) close()
      })
      outgoing.on('error', (error) => {
        clearTimeout(timer)
        reject(this.#broken(error))
      })
      outgoing.on('close', () => signal.removeEventListener('abort', close))
      outgoing.end()
    })
  }

  /** Closes all connections: requests that are under way fail. */
  close(): void {
    this.#isClosed = true
    this.#kept.destroy()
    this.#single.destroy()
  }

  /** One request and its answer, or why there is none, and whether that is for an idle connection which was closed. */
  #exchange(
    request: Request,
    authorization: string | undefined,
    end: (answer: Answer | undefined, error?: SecretierError, wasIdle?: boolean) => void,
  ): http.ClientRequest {
    let isAnswered = false
    // The server may close an idle connection at the very moment at which it is used again. A write could not be told
    // from one that was done, so that writes take connections of their own.
    const outgoing = this.#begin(request, authorization, request.isRead ? this.#kept : this.#single)
    outgoing.on('response', (message) => {
      isAnswered = true
      let body = ''
      message.setEncoding('utf8')
      message.on('data', (text: string) => (body += text))
      message.on('end', () => (message.complete ? end({ ...headOf(message), body }) : end(undefined, this.#broken())))
      message.on('error', (error) => end(undefined, this.#broken(error)))
    })
    outgoing.on('error', (error: NodeJS.ErrnoException) => {
      const isReset = error.code === 'ECONNRESET' || error.code === 'EPIPE'
      end(undefined, this.#broken(error), isReset && outgoing.reusedSocket && !isAnswered && !this.#isClosed)
    })
    outgoing.end(request.body)
    return outgoing
  }

  #begin({ method, path, headers, body }: Request, authorization: string | undefined, agent: http.Agent) {
    // A list of names and values is sent as it is, where Node would look at each header of an object several times.
    const list = ['host', this.#host]
    if (authorization !== undefined) list.push('authorization', authorization)
    if (body !== undefined) list.push('content-type', 'application/json', 'content-length', String(Buffer.byteLength(body)))
    if (headers !== undefined) list.push(...Object.entries(headers).flat())
    return this.#request({ ...this.#target, agent, method, path, headers: list })
  }

  // Node's error is not passed on as the cause: that of a malformed answer holds the answer's bytes.
  #broken(error?: NodeJS.ErrnoException): SecretierError {
    if (this.#isClosed) return new SecretierError('closed', 'the client was closed')
    return new SecretierError('unreachable', `no answer from ${this.#address} (${error?.code ?? 'it broke off'})`)
  }
}

function headOf(message: http.IncomingMessage) {
  return {
    status: message.statusCode ?? 0,
    // Node makes the table of headers when it is first asked for, which most answers never are.
    header: (name: string) => message.headers[name] as string | undefined,
  }
}

function parse(url: string): URL {
  let parsed
  try {
    parsed = new URL(url)
  } catch {}
  const isPlain = parsed && !parsed.username && !parsed.password && parsed.pathname === '/' && !parsed.search && !parsed.hash
  // The text is not repeated: it may hold a password.
  if (!parsed || !isPlain || !/^https?:$/.test(parsed.protocol)) {
    throw new SecretierError('invalid_option', "url is to be scheme, host and port alone, such as 'http://127.0.0.1:7227'")
  }
  return parsed
}
