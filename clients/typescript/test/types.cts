// The same package, required.
import secretier = require('secretier')
import hono = require('secretier/hono')

const client: secretier.Secretier = new secretier.Secretier({ socketPath: '/s' })
client.get('acme', 'K').then((value: string | null) => value)
hono.secrets(client, { tenant: (c) => c.req.header('x-tenant') })
