// The API: each tenant takes payments with a key of its own.

import { createHmac } from 'node:crypto'

import { Hono } from 'hono'
import { type Secretier, SecretierError } from 'secretier'
import { secrets } from 'secretier/hono'

export function api(secretier: Secretier) {
  const app = new Hono()

  app.use(secrets(secretier, { tenant: (c) => subdomainOf(c.req.header('host')) }))

  app.post('/pay', async (c) => {
    const { amount, currency } = (await c.req.json()) ?? {}
    if (!Number.isSafeInteger(amount) || amount <= 0 || typeof currency !== 'string') {
      return c.json({ error: 'amount is to be a whole number of cents, and currency a string' }, 400)
    }
    const key = await c.var.secret('STRIPE_SECRET_KEY')
    if (key === null) return c.json({ error: 'payments are not set up for this tenant' }, 404)
    return c.json({ payment: charge(key, amount, currency), amount, currency }, 201)
  })

  app.onError((error, c) => {
    if (error instanceof SyntaxError) return c.json({ error: 'the body is to be JSON' }, 400)
    if (!(error instanceof SecretierError)) throw error
    if (error.code === 'no_tenant') return c.json({ error: 'ask as a tenant: acme.localhost' }, 404)
    // It has no value and no token in it, and may be logged as it is.
    console.error(error.message, error.requestId ?? '')
    if (error.retryAfter !== undefined) c.header('retry-after', String(error.retryAfter))
    return c.json({ error: 'payments cannot be taken just now' }, 503)
  })

  return app
}

/** Stands for a call of Stripe: its result needs the key, and does not tell it. */
function charge(key: string, amount: number, currency: string): string {
  const mark = createHmac('sha256', key).update(`${amount} ${currency}`).digest('hex')
  return `pi_${mark.slice(0, 24)}`
}

/** The first label of a host that has another behind it: `acme` of `acme.localhost:3000`. */
function subdomainOf(host = ''): string | undefined {
  return /^([a-z0-9][a-z0-9-]*)\.[a-z]/i.exec(host)?.[1]?.toLowerCase()
}
