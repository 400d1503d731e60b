// Measures the client beside the least that the same could cost, in one run and in turn: npm run build && npm run bench
//
// Takes SECRETIER_BIN, the program, and starts it with an empty database, on a port and on a Unix socket.
// Tells for each way its p50 and its CPU (of this process, user and system) for one request, as the median of the
// rounds, and the ratios to node:http round by round. node:http asks the program too, unless HYPER_URL and HYPER_SOCKET
// name a server that answers anything with as many bytes: scripts/bench starts one, and takes the rounds as --json.
import http from 'node:http'

import { Secretier } from 'secretier'

import { serve } from './test/support.mjs'

const ROUNDS = Number(process.env.ROUNDS ?? 61)
const REQUESTS = 400
const [TENANT, KEY] = ['acme', 'STRIPE_SECRET_KEY']
const PATH = `/v1/tenants/${TENANT}/secrets/${KEY}`

const server = await serve()
const agent = new http.Agent({ keepAlive: true })
const overTcp = new Secretier({ url: server.url, token: server.token })
const overUnix = new Secretier({ socketPath: server.socketPath, token: server.token })
const cached = new Secretier({ url: server.url, token: server.token, cache: { maxAge: '1h', entries: 20_000 } })
await overTcp.set(TENANT, KEY, 'sk_test_' + '0'.repeat(32), { createTenant: true })
// As many as there may be, asked for in an order that no cache of the processor likes.
const ENTRIES = 10_000
const names = Array.from({ length: ENTRIES }, (_, i) => [`tenant-${i % 1000}`, `SECRET_KEY_${i}`])
const map = new Map(names.map(([tenant, key]) => [`${tenant}\0${key}`, 'value']))
const { hostname, port } = new URL(server.url)

const { HYPER_URL, HYPER_SOCKET } = process.env
const hyper = HYPER_URL && new URL(HYPER_URL)
const tcp = hyper ? { hostname: hyper.hostname, port: hyper.port } : { hostname, port }
const unix = { socketPath: HYPER_SOCKET ?? server.socketPath }
let bytes = 0

const bare = (target, isJson = !hyper) => () =>
  new Promise((resolve, reject) => {
    const request = http.request({ ...target, path: PATH, agent, headers: { authorization: `Bearer ${server.token}` } })
    request.on('response', (answer) => {
      let body = ''
      answer.setEncoding('utf8')
      answer.on('data', (text) => (body += text))
      answer.on('end', () => {
        bytes = body.length
        resolve(isJson ? JSON.parse(body).value : body)
      })
    })
    request.on('error', reject)
    request.end()
  })

const requests = {
  'node:http, TCP': bare(tcp),
  ...(hyper && {
    'node:http to it, TCP': bare({ hostname, port }, true),
    'node:http to it, Unix': bare({ socketPath: server.socketPath }, true),
  }),
  'get, TCP': () => overTcp.get(TENANT, KEY),
  'node:http, Unix': bare(unix),
  'get, Unix': () => overUnix.get(TENANT, KEY),
  'fetch, TCP': async () => {
    const answer = await fetch(server.url + PATH, { headers: { authorization: `Bearer ${server.token}` } })
    return (await answer.json()).value
  },
}
const lookups = {
  'get, cached, 1': () => cached.get(TENANT, KEY),
  'get, cached, 10000': (i) => cached.get(...names[(i * 7919) % ENTRIES]),
  'Map, 1': async () => map.get(`${TENANT}\0${KEY}`),
  'Map, 10000': async (i) => {
    const [tenant, key] = names[(i * 7919) % ENTRIES]
    return map.get(`${tenant}\0${key}`)
  },
}

const median = (numbers) => [...numbers].sort((a, b) => a - b)[Math.floor(numbers.length / 2)]

// One after the other, as one caller waits for its answers.
async function p50AndCpu(ask) {
  const times = new Float64Array(REQUESTS)
  const before = process.cpuUsage()
  for (let i = 0; i < REQUESTS; i++) {
    const begun = performance.now()
    await ask()
    times[i] = performance.now() - begun
  }
  const { user, system } = process.cpuUsage(before)
  return { p50: median(times) * 1000, cpu: (user + system) / REQUESTS }
}

// Too short to be timed one by one.
async function mean(ask) {
  const times = 200_000
  const begun = performance.now()
  for (let i = 0; i < times; i++) await ask(i)
  return ((performance.now() - begun) * 1e6) / times
}

const figures = Object.fromEntries(Object.keys(requests).map((name) => [name, []]))
for (let round = -5; round < ROUNDS; round++) {
  for (const [name, ask] of Object.entries(requests)) {
    const figure = await p50AndCpu(ask)
    if (round >= 0) figures[name].push(figure)
  }
}
const isJson = process.argv.includes('--json')
const print = isJson ? () => {} : console.log
const line = (...cells) => print(cells.map((cell, i) => (i ? String(cell).padStart(12) : String(cell).padEnd(20))).join(''))
line('', 'p50 µs', 'CPU µs', 'p50 ratio', 'CPU ratio')
for (const [name, rounds] of Object.entries(figures)) {
  const floor = figures[name.includes('Unix') ? 'node:http, Unix' : 'node:http, TCP']
  const ratio = (what) => median(rounds.map((figure, i) => figure[what] / floor[i][what])).toFixed(2)
  const of = (what) => median(rounds.map((figure) => figure[what])).toFixed(1)
  line(name, of('p50'), of('cpu'), ratio('p50'), ratio('cpu'))
}
// Absent ones are cached as others are, and need not be written first.
for (let i = 0; i < 10; i++) {
  const tenants = names.slice(i * 1000, (i + 1) * 1000)
  await Promise.all(tenants.map(([tenant, key]) => cached.get(tenant, key)))
}
print()
line('', 'ns')
const kept = Object.fromEntries(Object.keys(lookups).map((name) => [name, []]))
for (let round = -2; round < 8; round++) {
  for (const [name, ask] of Object.entries(lookups)) {
    const figure = await mean(ask)
    if (round >= 0) kept[name].push(figure)
  }
}
for (const [name, rounds] of Object.entries(kept)) line(name, Math.round(median(rounds)))

if (isJson) {
  const asked = (name) => ({ p50: figures[name].map(({ p50 }) => p50), cpu: figures[name].map(({ cpu }) => cpu) })
  const inMicroseconds = (name) => kept[name].map((figure) => figure / 1000)
  console.log(
    JSON.stringify({
      body: bytes,
      http_tcp: asked('node:http, TCP'),
      http_unix: asked('node:http, Unix'),
      own_tcp: asked('node:http to it, TCP'),
      own_unix: asked('node:http to it, Unix'),
      get_tcp: asked('get, TCP'),
      get_unix: asked('get, Unix'),
      fetch_tcp: asked('fetch, TCP'),
      cached: inMicroseconds('get, cached, 1'),
      cached_of_many: inMicroseconds('get, cached, 10000'),
      map: inMicroseconds('Map, 1'),
      map_of_many: inMicroseconds('Map, 10000'),
    }),
  )
}

for (const client of [overTcp, overUnix, cached]) client.close()
agent.destroy()
await server.stop()
