// Every documented method of Sandbox, commands, files and pty in JavaScript.
import { assert, check, e2b, eventually, main, raises } from './checks.mjs'

const { Sandbox, CommandExitError, NotFoundError, AuthenticationError, InvalidArgumentError, TimeoutError, SandboxError } = e2b
const box = await Sandbox.create({ timeoutMs: 600_000, metadata: { js: 'ü &=1' }, envs: { COLOR: 'green' } })

check('info_and_list', async () => {
  const i = await box.getInfo()
  assert.equal(i.sandboxId, box.sandboxId)
  assert.deepEqual(i.metadata, { js: 'ü &=1' })
  assert.equal(i.state, 'running')
  assert.equal((await Sandbox.getInfo(box.sandboxId)).memoryMB, 512)
  const found = await Sandbox.list({ query: { metadata: { js: 'ü &=1' }, state: ['running'] } }).nextItems()
  assert.deepEqual(found.map((s) => s.sandboxId), [box.sandboxId])
})

check('commands', async () => {
  const r = await box.commands.run('echo out; echo err >&2; echo $COLOR; whoami')
  assert.equal(r.stdout, 'out\ngreen\nuser\n')
  assert.equal(r.stderr, 'err\n')
  assert.equal((await box.commands.run('pwd; echo $X', { cwd: '/tmp', envs: { X: '1' }, user: 'root' })).stdout, '/tmp\n1\n')
  const e = await raises(CommandExitError, box.commands.run('exit 3'))
  assert.equal(e.exitCode, 3)
  await raises(TimeoutError, box.commands.run('sleep 60', { timeoutMs: 1000 }))
  await raises(AuthenticationError, box.commands.run('true', { user: 'x' }))
  await raises(InvalidArgumentError, box.commands.run('true', { cwd: '/no/such' }))
  assert.equal(await box.commands.kill(999999), false)
})

check('commands_background', async () => {
  let out = ''
  const h = await box.commands.run('cat', { background: true, stdin: true, onStdout: (s) => (out += s) })
  assert((await box.commands.list()).some((p) => p.pid === h.pid))
  await box.commands.sendStdin(h.pid, 'one\n')
  await box.commands.closeStdin(h.pid)
  assert.equal((await h.wait()).stdout, 'one\n')
  assert.equal(out, 'one\n')
  const k = await box.commands.run('sleep 1000', { background: true })
  await k.disconnect()
  const again = await box.commands.connect(k.pid)
  assert.equal(await again.kill(), true)
  await raises(CommandExitError, again.wait())
})

check('files', async () => {
  const w = await box.files.write('d/a.txt', 'héllo')
  assert.equal(w.path, '/home/user/d/a.txt')
  assert.equal(await box.files.read('d/a.txt'), 'héllo')
  const data = crypto.getRandomValues(new Uint8Array(65536))
  await box.files.write('/tmp/b', data.buffer)
  assert.deepEqual(await box.files.read('/tmp/b', { format: 'bytes' }), data)
  assert.equal((await (await box.files.read('/tmp/b', { format: 'blob' })).arrayBuffer()).byteLength, 65536)
  let n = 0
  for await (const c of await box.files.read('/tmp/b', { format: 'stream' })) n += c.length
  assert.equal(n, 65536)
  await box.files.write('/tmp/s', new Blob([data]).stream())
  assert.deepEqual(await box.files.read('/tmp/s', { format: 'bytes' }), data)
  await box.files.write('/tmp/g', 'g'.repeat(100000), { gzip: true })
  assert.equal((await box.files.read('/tmp/g', { gzip: true })).length, 100000)
  const many = await box.files.write([{ path: 'm/1', data: '1' }, { path: 'm/2', data: '2' }])
  assert.deepEqual(many.map((m) => m.path), ['/home/user/m/1', '/home/user/m/2'])
  await box.files.write('meta', '1', { metadata: { a: 'b' } })
  assert.deepEqual((await box.files.getInfo('meta')).metadata, { a: 'b' })
  assert.equal(await box.files.makeDir('x/y'), true)
  assert.equal(await box.files.makeDir('x/y'), false)
  assert.deepEqual((await box.files.list('m')).map((e) => e.name).sort(), ['1', '2'])
  assert.equal((await box.files.rename('m/1', 'm/3')).path, '/home/user/m/3')
  assert.equal(await box.files.exists('m/1'), false)
  await box.files.remove('m/3')
  await box.files.remove('m/3')
  await raises(NotFoundError, box.files.read('/no/such'))
  await raises(NotFoundError, box.files.list('/no/such'))
  await raises(InvalidArgumentError, box.files.read('/tmp'))
})

check('files_watch', async () => {
  await box.files.makeDir('watched')
  const seen = []
  const h = await box.files.watchDir('watched', (e) => seen.push(e), { recursive: true, includeEntry: true })
  await box.files.write('watched/f', '1')
  await eventually(() => seen.some((e) => e.name === 'f' && e.type === 'create' && e.entry?.path === '/home/user/watched/f'))
  await h.stop()
})

check('signed_urls', async () => {
  await box.files.write('s +.txt', 'signed')
  for (const o of [{}, { useSignatureExpiration: 60 }]) {
    assert.equal(await (await fetch(await box.downloadUrl('s +.txt', o))).text(), 'signed')
  }
  const form = new FormData()
  form.append('file', new Blob(['up']), 'up.txt')
  assert.equal((await fetch(await box.uploadUrl('up.txt'), { method: 'POST', body: form })).status, 200)
  assert.equal(await box.files.read('up.txt'), 'up')
})

check('pty', async () => {
  let out = ''
  const h = await box.pty.create({ cols: 80, rows: 24, onData: (d) => (out += new TextDecoder().decode(d)), timeoutMs: 0 })
  await box.pty.resize(h.pid, { cols: 100, rows: 30 })
  await box.pty.sendInput(h.pid, new TextEncoder().encode('stty size; exit 7\n'))
  const e = await raises(CommandExitError, h.wait())
  assert.equal(e.exitCode, 7)
  assert.match(out, /30 100/)
})

check('a_full_pool_of_streams', async () => {
  // The SDKs take 200 connections to one origin at most, and all sandboxes are
  // one here. Of one process: a guest without KVM starts few in a second.
  const h = await box.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
  const all = await Promise.all(Array.from({ length: 190 }, () => box.commands.connect(h.pid, { timeoutMs: 0 })))
  assert.equal(await box.files.exists('/etc/hostname'), true)
  await h.kill()
  await Promise.all([h, ...all].map((c) => raises(CommandExitError, c.wait())))
})

check('timeouts', async () => {
  await box.setTimeout(300_000)
  const before = (await box.getInfo()).endAt
  await box.connect({ timeoutMs: 10_000 })
  assert.deepEqual((await box.getInfo()).endAt, before)
})

check('pause_connect_and_snapshots', async () => {
  const h = await box.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
  h.wait().catch(() => {})
  await box.files.write('kept', 'kept')
  assert.equal(await box.pause(), true)
  assert.equal(await box.pause(), false)
  assert.equal(await box.isRunning(), false)
  await raises(e2b.SandboxNotFoundError, box.commands.run('true'))
  const same = await Sandbox.connect(box.sandboxId)
  assert.equal(await same.commands.kill(h.pid), true)
  const snap = await box.createSnapshot({ name: 'js-snap' })
  assert.equal(snap.snapshotId, 'js-snap')
  const listed = await box.listSnapshots().nextItems()
  assert.deepEqual(listed.map((s) => s.snapshotId), ['js-snap'])
  const child = await Sandbox.create('js-snap')
  assert.equal(await child.files.read('kept'), 'kept')
  assert.equal(await child.kill(), true)
  assert.equal(await Sandbox.deleteSnapshot('js-snap'), true)
  assert.equal(await Sandbox.deleteSnapshot('js-snap'), false)
})

check('errors', async () => {
  await raises(NotFoundError, Sandbox.connect('nosuchsandbox'))
  await raises(NotFoundError, Sandbox.getInfo('nosuchsandbox'))
  await raises(AuthenticationError, Sandbox.create({ apiKey: 'e2b_' + '0'.repeat(40) }))
  const e = await raises(SandboxError, Sandbox.create('no-such-template'))
  assert.match(e.message, /404/)
  assert.equal(await Sandbox.kill('nosuchsandbox'), false)
  assert.equal(await Sandbox.deleteSnapshot('ns/no:such'), false)
})

check('kill_while_streaming', async () => {
  const h = await box.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
  const [e] = await Promise.all([raises(TimeoutError, h.wait()), box.kill()])
  assert.match(e.message, /sandbox was killed/)
  assert.equal(await box.isRunning(), false)
  assert.equal(await box.kill(), false)
})

await main()
