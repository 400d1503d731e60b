// The one error class. It carries no value and no token, so it may be logged whole.

import type { Answer } from './transport.js'

/**
 * Says why there is no answer. `code` is stable: the server's own (`unavailable`, `out_of_scope`, `version_conflict`,
 * ...), or one of the client's:
 *
 * - `unreachable`: no connection, or it broke before the answer was whole
 * - `timeout`: no answer within `timeout`
 * - `invalid_answer`: something other than secretier answered
 * - `invalid_tenant`, `invalid_key`: a name that cannot stand in a path
 * - `invalid_option`, `token_unreadable`: the client is set up wrongly
 * - `no_tenant`: the Hono middleware was not told a tenant
 * - `closed`: the client was closed
 */
export class SecretierError extends Error {
  /** The kind of failure, for programs. */
  readonly code: string
  /** The HTTP status, where the server answered. */
  readonly status: number | undefined
  /** The id under which the server has the request on record. */
  readonly requestId: string | undefined
  /** Seconds after which the server suggests to ask again. */
  readonly retryAfter: number | undefined

  constructor(code: string, message: string, of?: { status: number; requestId?: string; retryAfter?: number }) {
    super(message)
    this.code = code
    this.status = of?.status
    this.requestId = of?.requestId
    this.retryAfter = of?.retryAfter
  }

  /** The error that an answer tells (`application/problem+json`, RFC 9457). */
  static of(answer: Answer): SecretierError {
    const { status } = answer
    const requestId = answer.header('x-request-id')
    const retryAfter = retryAfterOf(answer)
    const of = { status, ...(requestId !== undefined && { requestId }), ...(retryAfter !== undefined && { retryAfter }) }
    const problem = problemOf(answer)
    if (problem === undefined) {
      // Another server's page may hold anything, so that nothing of it is repeated.
      return new SecretierError('invalid_answer', `the answer (HTTP ${status}) is none of secretier's; check the address`, of)
    }
    return new SecretierError(problem.code, `${problem.title}: ${problem.detail} (${problem.code})`, of)
  }
}

// On the prototype, where it is no field of each error.
Object.defineProperty(SecretierError.prototype, 'name', { value: 'SecretierError', configurable: true, writable: true })

/** Seconds in `Retry-After`; secretier sends no dates there. */
export function retryAfterOf(answer: Answer): number | undefined {
  const text = answer.header('retry-after')
  return text !== undefined && /^\d{1,6}$/.test(text) ? Number(text) : undefined
}

/** The body of an error, where the answer is one of secretier's. */
export function problemOf(answer: Answer): { code: string; title: string; detail: string } | undefined {
  if (!answer.header('content-type')?.startsWith('application/problem+json')) return undefined
  try {
    const { code, title, detail } = JSON.parse(answer.body)
    return typeof code === 'string' ? { code, title: String(title), detail: String(detail) } : undefined
  } catch {
    return undefined
  }
}
