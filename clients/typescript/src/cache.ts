// Values kept in the process, until they are too old or the stream of changes (events.ts) tells that they are replaced.
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
  tenant: string
  key: string
  value: string | null
  /** When it was asked for, which is not later than it was true. */
  askedAt: number
  /** Since it was last considered for making room. */
  isUsed: boolean
}

export class Cache {
  /** By tenant, then by key: to join the two names would take longer than to look both up. */
  #tenants = new Map<string, Map<string, Entry>>()
  /** All of them, oldest first: a Set keeps the order in which they came. */
  #entries = new Set<Entry>()
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
  find(tenant: string, key: string): string | null | undefined {
    const entry = this.#tenants.get(tenant)?.get(key)
    if (entry === undefined) return undefined
    const now = performance.now()
    const oldest = this.#isWatched(now) ? this.#maxAge : Math.min(this.#maxAge, UNWATCHED)
    if (now - entry.askedAt >= oldest) {
      this.#remove(entry)
      return undefined
    }
    entry.isUsed = true
    return entry.value
  }

  /** To be called before a request is sent; its result keeps what was answered, unless something has changed since. */
  begin(): (tenant: string, key: string, value: string | null) => void {
    const [changes, askedAt] = [this.#changes, performance.now()]
    return (tenant, key, value) => {
      if (changes === this.#changes) this.#insert({ tenant, key, value, askedAt, isUsed: false })
    }
  }

  forget(tenant: string, key: string): void {
    this.#changes++
    const entry = this.#tenants.get(tenant)?.get(key)
    if (entry) this.#remove(entry)
  }

  forgetAll(): void {
    this.#changes++
    this.#tenants.clear()
    this.#entries.clear()
  }

  #insert(entry: Entry): void {
    const { tenant, key } = entry
    const former = this.#tenants.get(tenant)?.get(key)
    if (former) this.#remove(former)
    else if (this.#entries.size >= this.#capacity) this.#makeRoom()
    const keys = this.#tenants.get(tenant) ?? new Map<string, Entry>()
    this.#tenants.set(tenant, keys.set(key, entry))
    this.#entries.add(entry)
  }

  /**
   * Removes the oldest that was not used since it was last considered: LRU by second chances. To move an entry at each
   * use would cost more than all else that a use costs.
   */
  #makeRoom(): void {
    for (const entry of this.#entries) {
      if (!entry.isUsed) return this.#remove(entry)
      entry.isUsed = false
      this.#entries.delete(entry)
      this.#entries.add(entry)
    }
  }

  #remove(entry: Entry): void {
    this.#entries.delete(entry)
    const keys = this.#tenants.get(entry.tenant)
    keys?.delete(entry.key)
    if (keys?.size === 0) this.#tenants.delete(entry.tenant)
  }
}
