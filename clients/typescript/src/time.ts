// Durations as people write them, and waits that can be given up.

import { clearTimeout, setTimeout } from 'node:timers'

import { SecretierError } from './errors.js'

/** Milliseconds, or text with a unit: `'500ms'`, `'60s'`, `'5m'`, `'1h'`. */
export type Duration = number | string

const UNITS: Record<string, number> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000 }

export function milliseconds(name: string, duration: Duration): number {
  const [, digits, unit = ''] = /^(\d+(?:\.\d+)?)(ms|s|m|h)$/.exec(String(duration)) ?? []
  const result = typeof duration === 'number' ? duration : Number(digits) * (UNITS[unit] ?? NaN)
  if (!(result > 0 && Number.isFinite(result))) {
    throw new SecretierError('invalid_option', `${name} is to be milliseconds above 0, or text such as '500ms', '60s' or '5m'`)
  }
  return result
}

/** Resolves after so many milliseconds; rejects with the signal's reason. Idle, it does not keep the process alive. */
export function pause(duration: number, signal?: AbortSignal, isIdle = false): Promise<void> {
  return new Promise((resolve, reject) => {
    const giveUp = () => {
      clearTimeout(timer)
      reject(signal?.reason)
    }
    const timer = setTimeout(() => {
      signal?.removeEventListener('abort', giveUp)
      resolve()
    }, duration)
    if (isIdle) timer.unref()
    if (signal?.aborted) giveUp()
    else signal?.addEventListener('abort', giveUp, { once: true })
  })
}

/** Somebody who waits until a time of `performance.now()`. */
export interface Waiting {
  deadline: number
  late(): void
}

/** Tells those who wait when they are late. One timer serves all of them: one for each costs a twentieth of a request. */
export class Deadlines {
  #waiting = new Set<Waiting>()
  #timer: NodeJS.Timeout | undefined
  #next = Infinity

  add(waiting: Waiting): void {
    this.#waiting.add(waiting)
    if (waiting.deadline < this.#next) this.#wakeAt(waiting.deadline)
  }

  delete(waiting: Waiting): void {
    this.#waiting.delete(waiting)
  }

  #wakeAt(next: number): void {
    clearTimeout(this.#timer)
    this.#next = next
    if (next === Infinity) return
    // The request that is waited for keeps the process alive, which the timer outlives.
    this.#timer = setTimeout(() => this.#wake(), Math.max(1, next - performance.now())).unref()
  }

  #wake(): void {
    const now = performance.now()
    const isLate = ({ deadline }: Waiting) => deadline <= now
    for (const waiting of [...this.#waiting].filter(isLate)) waiting.late()
    this.#wakeAt(Math.min(...[...this.#waiting].map(({ deadline }) => deadline)))
  }
}
