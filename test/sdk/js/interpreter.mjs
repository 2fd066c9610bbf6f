// The client of the code interpreter, against the template that
// py/interpreter.py has built.
import { assert, check, main } from './checks.mjs'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const require = createRequire(process.env.WRENN_SDK_DIR + '/package.json')
const { Sandbox } = await import(pathToFileURL(require.resolve('@e2b/code-interpreter')))
const box = await Sandbox.create({ timeoutMs: 300_000 })

check('javascript_cells', async () => {
  let out = ''
  const e = await box.runCode('x = 1\nprint("hi")\nx + 1', { onStdout: (m) => (out += m.line) })
  assert.equal(e.text, '2')
  assert.deepEqual(e.logs.stdout, ['hi\n'])
  assert.equal(out, 'hi\n')
  assert.equal((await box.runCode('1 / 0')).error.name, 'ZeroDivisionError')
  const c = await box.createCodeContext({ cwd: '/tmp' })
  assert.equal((await box.runCode('import os; os.getcwd()', { context: c })).text, "'/tmp'")
  assert.equal((await box.listCodeContexts()).length, 2)
  await box.restartCodeContext(c)
  await box.removeCodeContext(c)
  assert.equal((await box.runCode('x')).text, '1')
})

check('javascript_interpreter_sandbox_ends', async () => {
  assert.equal(await box.kill(), true)
})

await main()
