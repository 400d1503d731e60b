// The client as its users see it: secrets in and out, over one transport, one token, and a cache where one is wanted.

import { Cache } from './cache.js'
import { SecretierError, problemOf, retryAfterOf } from './errors.js'
import { Events, SILENCE } from './events.js'
import { Flights } from './flights.js'
import { type Duration, milliseconds, pause } from './time.js'
import { Token } from './token.js'
import { type Answer, type Request, type Stream, Transport } from './transport.js'

export interface SecretierOptions {
  /** Scheme, host and port: `http://127.0.0.1:7227`. Either this or `socketPath`. */
  url?: string
  /** The path of secretier's Unix socket. */
  socketPath?: string
  /** The token itself. A process that the socket lets in without one needs neither this nor `tokenFile`. */
  token?: string
  /** A file with the token, which is read now, and again when the server refuses the token. */
  tokenFile?: string
  /** The longest time that a call takes, pauses included. 5 s where it is not set. */
  timeout?: Duration
  /** Keeps values in this process. Without it, each `get` is a request. */
  cache?: CacheOptions
}

export interface CacheOptions {
  /** How long a value is kept at most. */
  maxAge: Duration
  /** How many values are kept; the one that was used least lately makes room. */
  entries?: number
}

export interface CallOptions {
  /** Gives the call up, which then rejects with the signal's reason. */
  signal?: AbortSignal
}

export interface DeleteOptions extends CallOptions {
  /** Only over this version, by its ETag; `*` for any. Else the error is `version_conflict`. */
  ifMatch?: string
}

export interface SetOptions extends DeleteOptions {
  /** Only where there is no value yet. */
  ifNoneMatch?: '*'
  /** Makes the tenant, where it is new. Else the error is `tenant_unknown`. */
  createTenant?: boolean
}

export interface Secret {
  value: string
  version: number
  /** Names this version, for `ifMatch`. */
  etag: string
}

/** A value that is valid: see `valid`. */
export interface ValidValue {
  value: string
  /** Null where the value has not taken over yet. */
  version: number | null
  /** `pending` is about to take over, `previous` is valid until its end. */
  stage: 'current' | 'previous' | 'pending'
  /** RFC 3339; null where no end is known. */
  validUntil: string | null
}

/** Both are null where the owner took the value, and what it has by now could not be read. */
export interface Written {
  version: number | null
  etag: string | null
}

export interface SecretList {
  keys: { key: string; version: number; updatedAt: string }[]
  /** Secrets that are there and cannot be used, each with a word for why. */
  unavailable: { key: string; reason: string }[]
}

export class Secretier {
  // Private fields: neither util.inspect nor JSON.stringify shows the token or a value.
  #transport: Transport
  #token: Token
  #timeout: number
  #flights = new Flights<string | null>()
  #cache: Cache | undefined
  #events: Events | undefined

  constructor({ url, socketPath, token, tokenFile, timeout = '5s', cache }: SecretierOptions) {
    this.#transport = new Transport(url, socketPath)
    this.#token = new Token(token, tokenFile)
    this.#timeout = milliseconds('timeout', timeout)
    if (cache) this.#keep(cache)
  }

  /** The value; null where the server has proved that there is none. Every other failure to get one is an error. */
  async get(tenant: string, key: string, { signal }: CallOptions = {}): Promise<string | null> {
    const cached = this.#cache?.find(tenant, key)
    if (cached !== undefined) return cached
    return this.#flights.join(nameOf(tenant, key), signal, (signal) => this.#fetch(tenant, key, signal))
  }

  /** The values of several keys, at most 1000, by one request: all of them, or an error. */
  async getMany<const K extends string>(
    tenant: string,
    keys: readonly K[],
    { signal }: CallOptions = {},
  ): Promise<Record<K, string | null>> {
    const values = new Map<K, string | null | undefined>()
    for (const key of keys) values.set(key, this.#cache?.find(tenant, key))
    const unknown = [...values.keys()].filter((key) => values.get(key) === undefined)
    if (unknown.length > 0) {
      const keep = this.#fill()
      const body = JSON.stringify({ keys: unknown })
      const path = `${secretsOf(tenant)}/batch-get`
      const answer = await this.#ask({ method: 'POST', path, body, isRead: true }, 'again', signal)
      const { secrets = [], missing = [] } = bodyOf<Partial<BatchBody>>(answer)
      const found = new Map<string, string | null>(missing.map((key) => [key, null]))
      for (const secret of secrets) found.set(secret.key, valueOf(secret, tenant, secret.key))
      for (const key of unknown) {
        const value = found.get(key)
        if (value === undefined) throw invalidAnswer()
        values.set(key, value)
        keep?.(tenant, key, value)
      }
    }
    return Object.fromEntries(values) as Record<K, string | null>
  }

  /** A secret with its version, asked for at the server whatever is cached: to be changed by `set` with `ifMatch`. */
  async read(tenant: string, key: string, { signal }: CallOptions = {}): Promise<Secret | null> {
    const answer = await this.#ask({ method: 'GET', path: pathOf(tenant, key), isRead: true }, 'again', signal)
    if (isAbsent(answer)) return null
    const secret = bodyOf<SecretBody>(answer)
    return { value: valueOf(secret, tenant, key), version: secret.version, etag: answer.header('etag') ?? '' }
  }

  /**
   * Every value that is valid, the current one first: for whoever checks what others have signed with the secret. Asked
   * for at the server each time, whatever is cached; null where there is no such secret.
   */
  async valid(tenant: string, key: string, { signal }: CallOptions = {}): Promise<ValidValue[] | null> {
    const path = `${pathOf(tenant, key)}/valid`
    const answer = await this.#ask({ method: 'GET', path, isRead: true }, 'again', signal)
    if (isAbsent(answer)) return null
    const { values, ...about } = bodyOf<ValidBody>(answer)
    if (!Array.isArray(values) || values.length === 0) throw invalidAnswer()
    return values.map(({ value, version, stage, valid_until }) => {
      return { value: valueOf({ ...about, value }, tenant, key), version, stage, validUntil: valid_until }
    })
  }

  /** A tenant's keys, without values; null where there is no such tenant. */
  async list(tenant: string, { signal }: CallOptions = {}): Promise<SecretList | null> {
    const answer = await this.#ask({ method: 'GET', path: secretsOf(tenant), isRead: true }, 'again', signal)
    if (isAbsent(answer)) return null
    const { keys, unavailable = [] } = bodyOf<ListBody>(answer)
    if (!Array.isArray(keys)) throw invalidAnswer()
    return { keys: keys.map(({ updated_at, ...entry }) => ({ ...entry, updatedAt: updated_at })), unavailable }
  }

  /** Writes a value to its owner. */
  async set(tenant: string, key: string, value: string, options: SetOptions = {}): Promise<Written> {
    if (typeof value !== 'string') throw new SecretierError('invalid_body', 'a value is a string')
    const path = pathOf(tenant, key) + (options.createTenant ? '?create_tenant=true' : '')
    const body = JSON.stringify({ value })
    const answer = await this.#write(tenant, key, { method: 'PUT', path, body, isRead: false }, options)
    return { version: bodyOf<Written>(answer).version, etag: answer.header('etag') ?? null }
  }

  /** Deletes a secret. False where there was none. */
  async delete(tenant: string, key: string, options: DeleteOptions = {}): Promise<boolean> {
    const answer = await this.#write(tenant, key, { method: 'DELETE', path: pathOf(tenant, key), isRead: false }, options)
    if (isAbsent(answer)) return false
    if (answer.status !== 204) throw SecretierError.of(answer)
    return true
  }

  /** Whether the stream of changes is heard, so that cached values may live for `maxAge` rather than 5 s. */
  get isFollowing(): boolean {
    return this.#events?.isCurrent(performance.now()) ?? false
  }

  /** Closes connections and forgets values. Calls that are under way, and later ones, fail with `closed`. */
  close(): void {
    this.#events?.close()
    this.#transport.close()
    this.#cache = undefined
  }

  async #fetch(tenant: string, key: string, signal?: AbortSignal): Promise<string | null> {
    const keep = this.#fill()
    const answer = await this.#ask({ method: 'GET', path: pathOf(tenant, key), isRead: true }, 'again', signal)
    const value = isAbsent(answer) ? null : valueOf(bodyOf<SecretBody>(answer), tenant, key)
    keep?.(tenant, key, value)
    return value
  }

  async #write(tenant: string, key: string, request: Request, options: SetOptions): Promise<Answer> {
    const { ifMatch, ifNoneMatch, signal } = options
    const headers = { ...(ifMatch && { 'if-match': ifMatch }), ...(ifNoneMatch && { 'if-none-match': ifNoneMatch }) }
    // After a 503 it may have been done all the same. Under a condition, a second try would then be a conflict.
    const repeat = ifMatch || ifNoneMatch ? 'if-limited' : 'again'
    try {
      return await this.#ask({ ...request, headers }, repeat, signal)
    } finally {
      // Also where it failed: it may have been done.
      this.#changed(tenant, key)
    }
  }

  /** Asks until there is an answer that another try does not change, or no time for one. */
  async #ask(request: Request, repeat: 'again' | 'if-limited', signal?: AbortSignal): Promise<Answer> {
    const deadline = performance.now() + this.#timeout
    for (;;) {
      const answer = await this.#withToken((token) => this.#transport.send(request, token, deadline, signal))
      const mayRepeat = answer.status === 429 || (answer.status === 503 && repeat === 'again')
      const wait = mayRepeat ? retryAfterOf(answer) : undefined
      if (wait === undefined || performance.now() + wait * 1000 >= deadline) return answer
      await pause(wait * 1000, signal)
    }
  }

  /** Sends once more with the next token, where there is one, if the server refuses this one. */
  async #withToken<T>(send: (authorization: string | undefined) => Promise<T & { status: number }>): Promise<T> {
    const used = this.#token.authorization
    const answer = await send(used)
    return answer.status === 401 && this.#token.isRenewed(used) ? send(this.#token.authorization) : answer
  }

  #keep({ maxAge, entries = 10_000 }: CacheOptions): void {
    if (!(Number.isInteger(entries) && entries > 0)) {
      throw new SecretierError('invalid_option', 'cache.entries is to be a whole number above 0')
    }
    const events = new Events({
      open: (lastEventId, signal) => this.#open(lastEventId, signal),
      changed: (tenant, key) => this.#changed(tenant, key),
      reset: () => {
        this.#cache?.forgetAll()
        this.#flights.forgetAll()
      },
    })
    this.#events = events
    this.#cache = new Cache(milliseconds('cache.maxAge', maxAge), entries, (now) => events.isCurrent(now))
  }

  #fill() {
    // Nothing needs to be followed before there is something to keep.
    this.#events?.start()
    return this.#cache?.begin()
  }

  #changed(tenant: string, key: string): void {
    this.#cache?.forget(tenant, key)
    this.#flights.forget(nameOf(tenant, key))
  }

  async #open(lastEventId: string | undefined, signal: AbortSignal): Promise<Stream> {
    const headers = { accept: 'text/event-stream', ...(lastEventId && { 'last-event-id': lastEventId }) }
    const request: Request = { method: 'GET', path: '/v1/events', headers, isRead: true }
    const stream = await this.#withToken((token) => this.#transport.open(request, token, SILENCE, signal))
    if (stream.status !== 200) throw SecretierError.of({ ...stream, body: '' })
    return stream
  }
}

type SecretBody = { tenant: string; key: string; value: string; version: number }
type ValidBody = Pick<SecretBody, 'tenant' | 'key'> & {
  values: (Omit<ValidValue, 'validUntil'> & { valid_until: string | null })[]
}
type BatchBody = { secrets: SecretBody[]; missing: string[] }
type ListBody = { keys: { key: string; version: number; updated_at: string }[]; unavailable?: SecretList['unavailable'] }

/** Names a request that callers share. No tenant has a control character in its name. */
function nameOf(tenant: string, key: string): string {
  return `${tenant}\0${key}`
}

/** A shared folder is named with a slash before its name, in place of a tenant. */
function secretsOf(tenant: string): string {
  const isFolder = typeof tenant === 'string' && tenant.startsWith('/')
  const resource = isFolder ? `folders/${segment('tenant', tenant.slice(1))}` : `tenants/${segment('tenant', tenant)}`
  return `/v1/${resource}/secrets`
}

function pathOf(tenant: string, key: string): string {
  return `${secretsOf(tenant)}/${segment('key', key)}`
}

/** A name as one segment of a path. The server knows which names are good; here it only has to arrive as it is. */
function segment(what: 'tenant' | 'key', name: string): string {
  const error = (why: string) => new SecretierError(`invalid_${what}`, `the ${what} ${why}`)
  if (typeof name !== 'string' || name === '') throw error('is to be a string that is not empty')
  if (name === '.' || name === '..') throw error(`'${name}' cannot stand in a path, where it means a folder`)
  try {
    return encodeURIComponent(name)
  } catch {
    throw error('is not Unicode: it has half of a surrogate pair')
  }
}

/** Whether the server has proved that there is no such secret, or no such tenant. */
function isAbsent(answer: Answer): boolean {
  return answer.status === 404 && problemOf(answer)?.code === 'secret_not_found'
}

function bodyOf<T>(answer: Answer): T {
  if (answer.status !== 200 && answer.status !== 201) throw SecretierError.of(answer)
  let body
  try {
    body = JSON.parse(answer.body)
  } catch {
    // The reason is not told: it repeats a part of the text.
  }
  if (typeof body !== 'object' || body === null) throw invalidAnswer()
  return body
}

/** The value, if the answer is about the secret that was asked for: on no account may one tenant get another's. */
function valueOf(secret: Omit<SecretBody, 'version'>, tenant: string, key: string): string {
  if (secret.tenant !== tenant || secret.key !== key || typeof secret.value !== 'string') {
    throw invalidAnswer()
  }
  return secret.value
}

function invalidAnswer(): SecretierError {
  return new SecretierError('invalid_answer', "the answer is none of secretier's to this request; check the address")
}
