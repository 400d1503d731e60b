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
  /** Since it was last considered for making room. */
  isUsed: boolean
}

export class Cache {
  /** In the order in which they were set, oldest first, as a Map keeps it. */
  #entries = new Map<string, Entry>()
  #changes = 0
  #maxAge: number
  #capacity: number
  #isWatched: (now: number) => boolean

  constructor(maxAge: number, capacity: number, isWatched: (now: number) => boolean) {
    this.#maxAge = maxAge
    this.#capacity = capacity
    this.#isWatched = isWatched
  }

  /** The value; null where it is known to be absent, undefined where nothing is known. */
  find(name: string): string | null | undefined {
    const entry = this.#entries.get(name)
    if (entry === undefined) return undefined
    const now = performance.now()
    const oldest = this.#isWatched(now) ? this.#maxAge : Math.min(this.#maxAge, UNWATCHED)
    if (now - entry.askedAt >= oldest) {
      this.#entries.delete(name)
      return undefined
    }
    entry.isUsed = true
    return entry.value
  }

  /** To be called before a request is sent; its result keeps what was answered, unless something has changed since. */
  begin(): (name: string, value: string | null) => void {
    const [changes, askedAt] = [this.#changes, performance.now()]
    return (name, value) => {
      if (changes !== this.#changes) return
      this.#entries.delete(name)
      if (this.#entries.size >= this.#capacity) this.#makeRoom()
      this.#entries.set(name, { value, askedAt, isUsed: false })
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

  /**
   * Removes the oldest that was not used since it was last considered: LRU by second chances. To move an entry at each
   * use would cost more than all else that a use costs.
   */
  #makeRoom(): void {
    for (const [name, entry] of this.#entries) {
      this.#entries.delete(name)
      if (!entry.isUsed) return
      entry.isUsed = false
      this.#entries.set(name, entry)
    }
  }
}
