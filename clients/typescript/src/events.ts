// Follows the stream of changes, GET /v1/events: Server-Sent Events, as the HTML standard has them.
// https://html.spec.whatwg.org/multipage/server-sent-events.html

import { clearTimeout, setTimeout } from 'node:timers'

import { pause } from './time.js'
import type { Stream } from './transport.js'

/** The server says something every 2 s. Twice that without a word, and the stream counts as broken. */
export const SILENCE = 4_000

const FIRST_DELAY = 100
const LONGEST_DELAY = 10_000

/** Longer than any line that the server sends. */
const LONGEST_LINE = 65_536

export interface Follower {
  /** Opens the stream behind this event, or from now on, until the signal. Rejects where the server refuses it. */
  open(lastEventId: string | undefined, signal: AbortSignal): Promise<Stream>
  changed(tenant: string, key: string): void
  /** The server cannot tell which changes were missed: every one is possible. */
  reset(): void
}

export class Events {
  #follower: Follower
  #closing = new AbortController()
  #isStarted = false
  #lastEventId: string | undefined
  #heardAt = -Infinity
  #isCaughtUp = false

  constructor(follower: Follower) {
    this.#follower = follower
  }

  /** Whether every change is told that is more than a moment old. */
  isCurrent(now: number): boolean {
    return this.#isCaughtUp && now - this.#heardAt < SILENCE
  }

  /** Follows until it is closed. Does nothing where it does so already. */
  start(): void {
    if (this.#isStarted) return
    this.#isStarted = true
    void this.#follow(this.#closing.signal)
  }

  close(): void {
    this.#closing.abort()
  }

  async #follow(closing: AbortSignal): Promise<void> {
    let delay = FIRST_DELAY
    while (!closing.aborted) {
      let atLeast = 0
      try {
        await this.#listen(closing)
      } catch (error) {
        // It needs no report: what the server refuses, or that it is gone, the caller's next request meets too.
        atLeast = 1000 * ((error as { retryAfter?: number }).retryAfter ?? 0)
      }
      if (this.#isCaughtUp) delay = FIRST_DELAY
      this.#isCaughtUp = false
      await pause(Math.max(atLeast, delay) * (1 + Math.random()), closing, true).catch(() => {})
      delay = Math.min(2 * delay, LONGEST_DELAY)
    }
  }

  /** Reads one connection to its end. */
  async #listen(closing: AbortSignal): Promise<void> {
    const isNew = this.#lastEventId === undefined
    const stream = await this.#follower.open(this.#lastEventId, closing)
    // Changes from before this moment are not told.
    if (isNew) this.#follower.reset()
    const silence = setTimeout(() => stream.close(), SILENCE).unref()
    const reader = new EventReader()
    try {
      for await (const text of stream.text) {
        this.#heardAt = performance.now()
        silence.refresh()
        reader.read(text, (event) => this.#take(event))
      }
    } finally {
      clearTimeout(silence)
    }
  }

  #take({ type, id, data }: Event): void {
    if (type === 'comment') {
      // Changes that were missed come before the server's first comment.
      this.#isCaughtUp = true
      return
    }
    if (id !== undefined) this.#lastEventId = id
    if (type === 'reset') return this.#follower.reset()
    // An event of a newer server's is not for this client.
    if (type !== 'changed') return
    const name = nameIn(data)
    name ? this.#follower.changed(name.tenant, name.key) : this.#follower.reset()
  }
}

interface Event {
  /** `comment` stands for a line that is one. */
  type: string
  id: string | undefined
  data: string
}

const BLANK: Event = { type: '', id: undefined, data: '' }

/** Puts events together from text that comes in pieces. */
export class EventReader {
  #rest = ''
  #event = BLANK

  read(text: string, take: (event: Event) => void): void {
    // A carriage return at the end may be the first half of a line's end.
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/)
    this.#rest = lines.pop() ?? ''
    if (this.#rest.length > LONGEST_LINE) throw new Error('a line of the stream is too long')
    for (const line of lines) this.#readLine(line, take)
  }

  #readLine(line: string, take: (event: Event) => void): void {
    const event = this.#event
    if (line === '') {
      this.#event = BLANK
      // A comment is told by itself, and what follows it may be a line's end alone.
      if (event !== BLANK) take(event)
      return
    }
    const colon = line.indexOf(':')
    const field = colon < 0 ? line : line.slice(0, colon)
    const value = colon < 0 ? '' : line.slice(colon + 1).replace(/^ /, '')
    if (field === '') take({ ...BLANK, type: 'comment' })
    else if (field === 'event') this.#event = { ...event, type: value }
    else if (field === 'data') this.#event = { ...event, data: event.data === '' ? value : `${event.data}\n${value}` }
    // It goes back in a header.
    else if (field === 'id' && /^[\x21-\x7e]{1,200}$/.test(value)) this.#event = { ...event, id: value }
  }
}

function nameIn(data: string): { tenant: string; key: string } | undefined {
  try {
    const { tenant, key } = JSON.parse(data)
    return typeof tenant === 'string' && typeof key === 'string' ? { tenant, key } : undefined
  } catch {
    return undefined
  }
}
