// Compiled and never run: what the types promise.
import { Hono } from 'hono'
import { type Secret, type SecretList, Secretier, SecretierError, type Written } from 'secretier'
import { type SecretOfTenant, secrets } from 'secretier/hono'

type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false
function same<A, B>(_: Same<A, B>) {}

const secretier = new Secretier({ url: 'http://127.0.0.1:7227', tokenFile: '/run/secrets/secretier-token' })
new Secretier({ socketPath: '/run/secretier/secretier.sock', timeout: '2s', cache: { maxAge: '60s', entries: 10_000 } })
const { signal } = new AbortController()

const one = secretier.get('acme', 'K', { signal })
same<typeof one, Promise<string | null>>(true)
const many = secretier.getMany('acme', ['A', 'B'])
same<typeof many, Promise<Record<'A' | 'B', string | null>>>(true)
const some = secretier.getMany('acme', [] as string[], { signal })
same<typeof some, Promise<Record<string, string | null>>>(true)
const listed = secretier.list('acme')
same<typeof listed, Promise<SecretList | null>>(true)
const read = secretier.read('acme', 'K')
same<typeof read, Promise<Secret | null>>(true)
const written = secretier.set('acme', 'K', 'v', { ifMatch: '"e"', createTenant: true })
same<typeof written, Promise<Written>>(true)
const deleted = secretier.delete('acme', 'K', { ifMatch: '"e"' })
same<typeof deleted, Promise<boolean>>(true)

// @ts-expect-error: there is no other condition than that there is none
secretier.set('acme', 'K', 'v', { ifNoneMatch: '"e"' })
new Secretier({ url: 'http://127.0.0.1:7227', cache: { maxAge: '60s' } })
// @ts-expect-error: a value is kept for a time
new Secretier({ url: 'http://127.0.0.1:7227', cache: { entries: 100 } })

const error = new SecretierError('code', 'message')
same<typeof error.status, number | undefined>(true)

// In one chain, by the middleware's own type.
new Hono()
  .use(secrets(secretier, { tenant: (c) => c.req.header('x-tenant') }))
  .get('/', async (c) => c.text((await c.var.secret('K')) ?? ''))

// In statements of their own, by Hono's map of variables.
const app = new Hono()
app.use(secrets(secretier, { tenant: async () => null }))
app.get('/', (c) => {
  same<typeof c.var.secret, SecretOfTenant>(true)
  // @ts-expect-error: it is a promise, and may be null
  return c.text(c.var.secret('K'))
})
