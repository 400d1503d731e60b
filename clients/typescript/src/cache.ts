// Values kept in the process: the cache decides what may still be answered, the stream of changes (events.ts) tells it
// what may not.
//
// Why no replaced value stays. A fill takes `changes` before its request is sent, and is dropped where it differs when
// the answer is there. For a change C of a key that a fill F has asked for:
//
// - C is told before F's answer: `changes` differs, F is dropped.
// - C is told after F's answer was kept: C removes it.
// - F began after C was told: the server tells a change once it serves it, so F's answer is the new value.
//
// One count for all keys drops more than it has to, which costs a request each and is never wrong.

/** How long a value lives that no stream vouches for. */
export const UNWATCHED = 5_000

interface Entry {
  value: string | null
  /** When it was asked for, which is not later than it was true. */
  askedAt: number
}

export class Cache {
  /** In the order of use, oldest first: a Map keeps the order in which keys were set. */
  #entries = new Map<string, Entry>()
  #changes = 0
  #newest: Entry | undefined

  constructor(
    private readonly maxAge: number,
    private readonly capacity: number,
    private readonly isWatched: (now: number) => boolean,
  ) {}

  /** The value; null where it is known to be absent, undefined where nothing is known. */
  find(name: string): string | null | undefined {
    const entry = this.#entries.get(name)
    if (entry === undefined) return undefined
    const now = performance.now()
    const oldest = this.isWatched(now) ? this.maxAge : Math.min(this.maxAge, UNWATCHED)
    if (now - entry.askedAt >= oldest) {
      this.#entries.delete(name)
      return undefined
    }
    if (entry !== this.#newest) {
      this.#entries.delete(name)
      this.#entries.set(name, entry)
      this.#newest = entry
    }
    return entry.value
  }

  /** To be called before a request is sent; its result keeps what was answered, unless something has changed since. */
  begin(): (name: string, value: string | null) => void {
    const [changes, askedAt] = [this.#changes, performance.now()]
    return (name, value) => {
      if (changes !== this.#changes) return
      this.#entries.delete(name)
      this.#newest = { value, askedAt }
      this.#entries.set(name, this.#newest)
      if (this.#entries.size > this.capacity) this.#entries.delete(this.#entries.keys().next().value as string)
    }
  }

  forget(name: string): void {
    this.#changes++
    this.#entries.delete(name)
  }

  forgetAll(): void {
    this.#changes++
    this.#entries.clear()
  }
}
