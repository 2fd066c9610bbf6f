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

/**
 * Makes a function that gives the public methods of objects that no check used.
 * but names those that have nothing to do with a server of ours; what is private
 * to TypeScript alone is named, too.
 */
export function everyMethodOf(objects, but) {
  const every = new Set()
  const asked = new Set()
  for (const [label, object] of Object.entries(objects)) {
    for (let o = object; o && o !== Object.prototype && o !== Function.prototype; o = Object.getPrototypeOf(o)) {
      for (const name of Object.getOwnPropertyNames(o)) {
        const { value, writable } = Object.getOwnPropertyDescriptor(o, name)
        if (typeof value !== 'function' || !writable || name === 'constructor' || every.has(label + '.' + name)) continue
        every.add(label + '.' + name)
        // The SDK's own calls do not count.
        o[name] = function (...args) {
          if (!/node_modules.e2b/.test(new Error().stack.split('\n')[2])) asked.add(label + '.' + name)
          return value.apply(this, args)
        }
      }
    }
  }
  const left = but.filter((n) => !every.has(n))
  assert.deepEqual(left, [], 'there are no such methods')
  return () => [...every].filter((n) => !asked.has(n) && !but.includes(n)).sort()
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
