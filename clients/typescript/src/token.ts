// The token, and where to look for the next one.

import { readFileSync } from 'node:fs'

import { SecretierError } from './errors.js'

export class Token {
  #file: string | undefined
  #authorization: string | undefined

  constructor(token: string | undefined, file: string | undefined) {
    if (token !== undefined && file !== undefined) {
      throw new SecretierError('invalid_option', 'token and tokenFile exclude each other')
    }
    this.#file = file
    this.#authorization = file === undefined ? token && header(token, 'the token') : read(file)
  }

  /** The header `Authorization`; undefined without a token, for a Unix socket that wants none. */
  get authorization(): string | undefined {
    return this.#authorization
  }

  /** Whether there is another token than the one that the server has just refused. */
  isRenewed(refused: string | undefined): boolean {
    // Many callers may be refused at once: the first reads the file, the others find its token here.
    if (this.#file !== undefined && this.#authorization === refused) this.#authorization = read(this.#file)
    return this.#authorization !== refused
  }
}

function read(file: string): string {
  let text
  try {
    text = readFileSync(file, 'utf8')
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    throw new SecretierError('token_unreadable', `the token file ${file} cannot be read (${code})`)
  }
  return header(text.trim(), `the content of ${file}`)
}

function header(token: string, what: string): string {
  // Node's own message about a header that cannot be sent is about headers, not about tokens.
  if (!/^[\x21-\x7e]+$/.test(token)) {
    throw new SecretierError('token_unreadable', `${what} is no token: a token is one word of printable ASCII`)
  }
  return `Bearer ${token}`
}
