// Every documented method of Sandbox, commands, files and pty in JavaScript.
import { assert, check, e2b, everyMethodOf, eventually, main, raises } from './checks.mjs'

const { Sandbox, CommandExitError, NotFoundError, AuthenticationError, InvalidArgumentError, TimeoutError, SandboxError } = e2b
const of = (o) => Object.getPrototypeOf(o)
const some = new Sandbox({ sandboxId: 'some', envdVersion: '0.6.13' })
const unused = everyMethodOf(
  { Sandbox, sandbox: Sandbox.prototype, files: of(some.files), commands: of(some.commands), pty: of(some.pty), git: of(some.git) },
  [
    // There is no MCP gateway; a git server that wants a password is another one's.
    'sandbox.getMcpUrl', 'sandbox.getMcpToken', 'git.dangerouslyAuthenticate',
    // Not in the types.
    ...['connectSandbox', 'createSandbox', 'forkSandbox', 'resolveOpts'].map((n) => 'Sandbox.' + n),
    ...['resolveApiOpts', 'fileUrl'].map((n) => 'sandbox.' + n), 'commands.start',
    ...['getRemoteUrl', 'hasUpstream', 'resolveRemoteName', 'runGit', 'runShell', 'withRemoteCredentials'].map((n) => 'git.' + n),
  ],
)
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
  const all = await Promise.all(Array.from({ length: 198 }, () => box.commands.connect(h.pid, { timeoutMs: 0 })))
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

check('input_of_many_kinds', async () => {
  const h = await box.commands.run('cat', { background: true, stdin: true })
  await h.sendStdin('one\n')
  await h.sendStdin(new TextEncoder().encode('zwö\n'))
  await h.closeStdin()
  assert.equal((await h.wait()).stdout, 'one\nzwö\n')
  let out = ''
  const t = await box.pty.create({ cols: 80, rows: 24, onData: () => {}, timeoutMs: 0 })
  const again = await box.pty.connect(t.pid, { onData: (d) => (out += new TextDecoder().decode(d)), timeoutMs: 0 })
  await box.pty.sendInput(t.pid, new TextEncoder().encode('echo $((20+3)); exit 3\n'))
  assert.equal((await raises(CommandExitError, again.wait())).exitCode, 3)
  assert.match(out, /23/)
  const k = await box.pty.create({ cols: 80, rows: 24, onData: () => {}, timeoutMs: 0 })
  assert.equal(await box.pty.kill(k.pid), true)
  const w = await box.files.writeFiles([{ path: 'wf/1', data: '1' }, { path: 'wf/2', data: new Blob(['2']) }])
  assert.deepEqual(w.map((f) => f.name), ['1', '2'])
})

check('git', async () => {
  const g = box.git
  await g.configureUser('A User', 'a@example.com')
  await g.setConfig('init.defaultBranch', 'main')
  assert.equal(await g.getConfig('user.name'), 'A User')
  await g.init('work', { initialBranch: 'main' })
  await g.init('bare.git', { bare: true, initialBranch: 'main' })
  await box.files.write('work/a', '1\n')
  await g.add('work')
  await g.commit('work', 'one')
  await g.remoteAdd('work', 'origin', '/home/user/bare.git')
  assert.equal(await g.remoteGet('work', 'origin'), '/home/user/bare.git')
  await g.push('work', { remote: 'origin', branch: 'main' })
  await g.clone('file:///home/user/bare.git', { path: 'copy', depth: 1 })
  await g.createBranch('work', 'topic')
  await g.checkoutBranch('work', 'main')
  assert.deepEqual((await g.branches('work')).branches.sort(), ['main', 'topic'])
  await g.deleteBranch('work', 'topic')
  await box.files.write('work/a', '2\n')
  await g.restore('work', { paths: ['a'] })
  await g.reset('work', { mode: 'hard' })
  assert.equal((await g.status('work')).isClean, true)
  await g.pull('copy')
  assert.equal(await box.files.read('copy/a'), '1\n')
})

check('life_cycle_by_id', async () => {
  const s = await Sandbox.create({ timeoutMs: 600_000, allowInternetAccess: false })
  const i = s.sandboxId
  const info = await Sandbox.getFullInfo(i)
  assert.equal(info.allowInternetAccess, false)
  await Sandbox.setTimeout(i, 500_000)
  await s.updateNetwork({ allowOut: ['*.wrenn.test'], denyOut: ['0.0.0.0/0'] })
  assert.deepEqual((await s.getInfo()).network.allowOut, ['*.wrenn.test'])
  await Sandbox.updateNetwork(i, {})
  assert((await s.getMetrics()).length >= 0 && Array.isArray(await Sandbox.getMetrics(i)))
  assert.equal(await Sandbox.pause(i), true)
  assert.equal(await Sandbox.pause(i), false)
  await Sandbox.connect(i)
  assert.equal(await Sandbox.betaPause(i), true)
  await s.connect()
  assert.equal(await s.betaPause(), true)
  await s.connect()
  const a = await Sandbox.createSnapshot(i, { name: 'js-by-id' })
  const named = await Sandbox.listSnapshots({ sandboxId: i, name: 'js-by-id' }).nextItems()
  assert.deepEqual(named.map((x) => x.snapshotId), ['js-by-id'])
  assert.equal(await Sandbox.deleteSnapshot(a.snapshotId), true)
  for (const forks of [await s.fork({ timeoutMs: 60_000 }), await Sandbox.fork(i, { timeoutMs: 60_000, count: 1 })]) {
    assert.equal(forks.length, 1)
    assert.equal(await Sandbox.kill(forks[0].sandboxId), true)
  }
  assert.equal(await Sandbox.kill(i), true)
})

check('a_client_object', async () => {
  const c = new e2b.E2B({ apiKey: process.env.E2B_API_KEY })
  assert.equal((await (await c.Sandbox.connect(box.sandboxId)).commands.run('echo bound')).stdout, 'bound\n')
  assert.equal(await c.Template.exists('base'), true)
  assert.equal(box.getHost(3000), `3000-${box.sandboxId}.${box.sandboxDomain}`)
})

check('kill_while_streaming', async () => {
  const h = await box.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
  const [e] = await Promise.all([raises(TimeoutError, h.wait()), box.kill()])
  assert.match(e.message, /sandbox was killed/)
  assert.equal(await box.isRunning(), false)
  assert.equal(await box.kill(), false)
})

check('every_documented_method_was_used', async () => {
  assert.deepEqual(unused(), [])
})

await main()
