// What an application does with Infisical's SDK for Node, unmodified: run by scripts/test-sdks in a folder
// that has the version to be tried.
import assert from 'node:assert/strict'

const { URL_OF_PROXY: siteUrl, CLIENT_ID: clientId, CLIENT_SECRET: clientSecret, PROJECT_ID: projectId } = process.env
const environment = 'dev'
const acme = '/tenants/acme'
const sdk = await import('@infisical/sdk').then((module) => module.default ?? module)

// Version 2 is a native library with other names for the same.
async function client() {
  if (sdk.InfisicalSDK === undefined) {
    const client = new sdk.InfisicalClient({ siteUrl, cacheTtl: 0, auth: { universalAuth: { clientId, clientSecret } } })
    const options = (secretPath) => ({ environment, projectId, path: secretPath, type: 'shared' })
    return {
      list: (path) => client.listSecrets({ environment, projectId, path }),
      get: (secretName, path) => client.getSecret({ ...options(path), secretName }),
      create: (secretName, secretValue) => client.createSecret({ ...options(acme), secretName, secretValue }),
      update: (secretName, secretValue) => client.updateSecret({ ...options(acme), secretName, secretValue }),
      remove: (secretName) => client.deleteSecret({ ...options(acme), secretName }),
    }
  }
  const client = new sdk.InfisicalSDK({ siteUrl })
  await client.auth().universalAuth.login({ clientId, clientSecret })
  const secrets = client.secrets()
  const options = { environment, projectId, secretPath: acme }
  return {
    list: async (secretPath) => (await secrets.listSecrets({ environment, projectId, secretPath, includeImports: true })).secrets,
    get: (secretName, secretPath) => secrets.getSecret({ environment, projectId, secretPath, secretName }),
    create: (secretName, secretValue) => secrets.createSecret(secretName, { ...options, secretValue }),
    update: (secretName, secretValue) => secrets.updateSecret(secretName, { ...options, secretValue }),
    remove: (secretName) => secrets.deleteSecret(secretName, options),
  }
}

async function refused(asking, status, words) {
  const error = await asking.then(() => undefined, (error) => error)
  const told = `${error?.message} ${error?.statusCode ?? ''}`
  assert.ok(error !== undefined && (told.includes(`${status}`) || words.test(told)), `not ${status}: ${told}`)
}

const secrets = await client()
const listed = await secrets.list(acme)
assert.ok(listed.some((one) => one.secretKey === 'DATABASE_URL' && one.secretValue.startsWith('postgres://')))
assert.equal((await secrets.get('DATABASE_URL', acme)).secretValue, listed.find((one) => one.secretKey === 'DATABASE_URL').secretValue)
// While Infisical is down, nothing is written.
if (process.env.ONLY_READ) process.exit(0)
for (const name of ['SDK_KEY', 'odd name-é%25']) {
  // 2.3.5 does not encode what it puts into a path.
  if (sdk.InfisicalSDK === undefined && name !== 'SDK_KEY') continue
  await secrets.create(name, 'one')
  assert.equal((await secrets.get(name, acme)).secretValue, 'one')
  await secrets.update(name, 'two')
  assert.equal((await secrets.get(name, acme)).secretValue, 'two')
  await secrets.remove(name)
  await refused(secrets.get(name, acme), 404, /not found/)
}
const shared = await secrets.list('/hono-api')
assert.ok(shared.some((one) => one.secretKey === 'SESSION_SECRET' && one.secretValue.length === 64))
await refused(secrets.list('/tenants/globex'), 403, /does not reach/)
await refused(secrets.get('NO_SUCH_SECRET', acme), 404, /not found/)
// 2.3.5 renews its token in a thread of its own.
process.exit(0)
