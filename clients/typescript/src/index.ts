export {
  type CacheOptions,
  type CallOptions,
  type DeleteOptions,
  type Secret,
  type SecretList,
  Secretier,
  type SecretierOptions,
  type SetOptions,
  type ValidValue,
  type Written,
} from './client.js'
export { SecretierError } from './errors.js'
export type { Duration } from './time.js'
