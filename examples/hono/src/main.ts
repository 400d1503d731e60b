// Starts the API, with what it needs of secretier taken from the environment.

import { serve } from '@hono/node-server'
import { Secretier } from 'secretier'

import { api } from './app.js'

const {
  SECRETIER_URL: url = 'http://127.0.0.1:7227',
  SECRETIER_TOKEN_FILE: tokenFile = '../../secretier-dev/token',
  PORT: port = '3000',
} = process.env

const secretier = new Secretier({ url, tokenFile, cache: { maxAge: '60s', entries: 10_000 } })
const server = serve({ fetch: api(secretier).fetch, hostname: '127.0.0.1', port: Number(port) }, ({ port }) => {
  console.log(`the API listens on http://acme.localhost:${port}`)
})

for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => server.close(() => secretier.close()))
}
