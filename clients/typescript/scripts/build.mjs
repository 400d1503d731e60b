// Builds dist/: the same sources as ES modules and as CommonJS, each folder saying which it holds.
import { spawnSync } from 'node:child_process'
import { mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('..', import.meta.url))
const commonJs = ['--module', 'CommonJS', '--moduleResolution', 'Node10', '--esModuleInterop', 'true', '--verbatimModuleSyntax', 'false']

rmSync(`${root}dist`, { recursive: true, force: true })
for (const [folder, type, options] of [
  ['esm', 'module', []],
  ['cjs', 'commonjs', commonJs],
]) {
  mkdirSync(`${root}dist/${folder}`, { recursive: true })
  writeFileSync(`${root}dist/${folder}/package.json`, `{ "type": "${type}" }\n`)
  const tsc = `${root}node_modules/typescript/bin/tsc`
  const { status } = spawnSync(process.execPath, [tsc, '-p', root, '--outDir', `${root}dist/${folder}`, ...options], { stdio: 'inherit' })
  if (status !== 0) process.exit(1)
}
