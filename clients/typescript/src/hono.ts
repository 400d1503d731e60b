// Middleware for Hono: c.var.secret(key) is the secret of the request's tenant.

import type { Context, MiddlewareHandler } from 'hono'

import type { Secretier } from './client.js'
import { SecretierError } from './errors.js'

export type SecretOfTenant = (key: string) => Promise<string | null>

export interface SecretsOptions {
  /** The tenant of a request. Asked once a request, and only if a secret is. */
  tenant: (c: Context) => string | null | undefined | Promise<string | null | undefined>
}

declare module 'hono' {
  interface ContextVariableMap {
    secret: SecretOfTenant
  }
}

/** Sets `c.var.secret`. Where no tenant can be told, it rejects with `no_tenant`, and nothing is asked. */
export function secrets(
  secretier: Pick<Secretier, 'get'>,
  { tenant }: SecretsOptions,
): MiddlewareHandler<{ Variables: { secret: SecretOfTenant } }> {
  return async (c, next) => {
    let known: Promise<string> | undefined
    c.set('secret', async (key) => secretier.get(await (known ??= tenantOf(c, tenant)), key))
    await next()
  }
}

async function tenantOf(c: Context, tenant: SecretsOptions['tenant']): Promise<string> {
  const name = await tenant(c)
  if (!name) throw new SecretierError('no_tenant', `no tenant can be told from ${c.req.method} ${c.req.path}`)
  // A request must not lead to the application's own secrets by what it says of itself.
  if (name.startsWith('/')) throw new SecretierError('invalid_tenant', 'a shared folder is no tenant of a request')
  return name
}
