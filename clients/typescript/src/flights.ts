// Callers who ask for the same at once share one request.

interface Flight<T> {
  answer: Promise<T>
  callers: number
  /** Where each caller may give up, and so all of them. */
  cancel: AbortController | undefined
}

export class Flights<T> {
  #flights = new Map<string, Flight<T>>()

  /** The answer of the flight that is under way, else of a new one. It ends early once all its callers gave up. */
  join(name: string, signal: AbortSignal | undefined, start: (signal?: AbortSignal) => Promise<T>): Promise<T> {
    if (signal?.aborted) return Promise.reject(signal.reason)
    const flight = this.#flights.get(name) ?? this.#begin(name, signal && new AbortController(), start)
    flight.callers++
    return signal ? this.#unlessAborted(name, flight, signal) : flight.answer
  }

  /** The next caller starts a new one. */
  forget(name: string): void {
    this.#flights.delete(name)
  }

  forgetAll(): void {
    this.#flights.clear()
  }

  #begin(name: string, cancel: AbortController | undefined, start: (signal?: AbortSignal) => Promise<T>): Flight<T> {
    const flight: Flight<T> = { answer: start(cancel?.signal), callers: 0, cancel }
    this.#flights.set(name, flight)
    const end = () => this.#end(name, flight)
    flight.answer.then(end, end)
    return flight
  }

  #end(name: string, flight: Flight<T>): void {
    // Another may have taken its place since it was forgotten.
    if (this.#flights.get(name) === flight) this.#flights.delete(name)
  }

  #unlessAborted(name: string, flight: Flight<T>, signal: AbortSignal): Promise<T> {
    return new Promise((resolve, reject) => {
      const leave = () => {
        reject(signal.reason)
        if (--flight.callers > 0) return
        this.#end(name, flight)
        flight.cancel?.abort(signal.reason)
      }
      signal.addEventListener('abort', leave, { once: true })
      const stay = () => signal.removeEventListener('abort', leave)
      flight.answer.then(resolve, reject).finally(stay)
    })
  }
}
