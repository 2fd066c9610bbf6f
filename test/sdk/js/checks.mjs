// Names checks, runs them one after the other and prints a line for each.
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

export { assert }
const require = createRequire(process.env.WRENN_SDK_DIR + '/package.json')
export const e2b = await import(pathToFileURL(require.resolve('e2b')))

const checks = []
export const check = (name, f) => checks.push([name, f])

export async function main() {
  let failed = false
  for (const [name, f] of checks) {
    const start = Date.now()
    const out = { name, ok: true }
    try {
      await f()
    } catch (e) {
      failed = true
      out.ok = false
      out.why = String(e?.stack ?? e)
    }
    out.seconds = (Date.now() - start) / 1000
    console.log('CHECK ' + JSON.stringify(out))
  }
  process.exit(failed ? 1 : 0)
}

/** The error of this class with which a promise ends. */
export async function raises(kind, promise) {
  let got
  try {
    got = await promise
  } catch (e) {
    assert(e instanceof kind, `want ${kind.name}, got ${e?.stack ?? e}`)
    return e
  }
  assert.fail(`no ${kind.name} was raised; got ${JSON.stringify(got)}`)
}

/** Asks until the answer is true: for facts that send no event. */
export async function eventually(ask, limit = 60_000) {
  const end = Date.now() + limit
  for (;;) {
    const got = await ask()
    if (got) return got
    assert(Date.now() < end, 'it did not come true')
    await new Promise((r) => setTimeout(r, 50))
  }
}
