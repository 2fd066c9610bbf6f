// The class of error of every bad input in JavaScript. The server has little
// memory for sandboxes and a low limit of requests.
import net from 'node:net'
import { assert, check, e2b, main, raises } from './checks.mjs'

const {
  Sandbox, SandboxError, SandboxNotFoundError, NotFoundError, FileNotFoundError, InvalidArgumentError, AuthenticationError,
  RateLimitError, TimeoutError, NotEnoughSpaceError, CommandExitError,
} = e2b
const nobody = 'nosuchsandbox'
const apiKey = 'e2b_' + '0'.repeat(40)
const size = { cols: 1, rows: 1, onData: () => {} }

const full = async (b) => {
  await b.commands.run('mkdir -p /tmp/full && mount -t tmpfs -o size=1m tmpfs /tmp/full && chmod 777 /tmp/full', { user: 'root' })
  await b.files.write('/tmp/full/f', 'x'.repeat(4 << 20))
}

// What is asked, and how it ends: the class of error, and words that it says.
const table = {
  'connect to nobody': [SandboxNotFoundError, () => Sandbox.connect(nobody)],
  'info of nobody': [SandboxNotFoundError, () => Sandbox.getInfo(nobody)],
  'limit of nobody': [SandboxNotFoundError, () => Sandbox.setTimeout(nobody, 10_000)],
  'pause of nobody': [SandboxNotFoundError, () => Sandbox.pause(nobody)],
  'snapshot of nobody': [SandboxNotFoundError, () => Sandbox.createSnapshot(nobody)],
  'fork of nobody': [SandboxNotFoundError, () => Sandbox.fork(nobody)],
  'metrics of nobody': [SandboxNotFoundError, () => Sandbox.getMetrics(nobody)],
  'network of nobody': [SandboxNotFoundError, () => Sandbox.updateNetwork(nobody, {})],
  'a wrong key': [AuthenticationError, () => Sandbox.create({ apiKey })],
  'kill with a wrong key': [AuthenticationError, (b) => Sandbox.kill(b.sandboxId, { apiKey })],
  'no such template': [SandboxError, () => Sandbox.create('no-such'), /404.*no-such/],
  'a bad name of a template': [SandboxError, () => Sandbox.create('Not A Name'), /400.*template/],
  'a limit too long': [SandboxError, () => Sandbox.create({ timeoutMs: 1e12 }), /400.*timeout/],
  'a bad variable': [SandboxError, () => Sandbox.create({ envs: { 'A=B': '1' } }), /400.*envs/],
  'too much metadata': [SandboxError, () => Sandbox.create({ metadata: { a: 'x'.repeat(100_000) } }), /400.*metadata/],
  'a rule that is none': [SandboxError, (b) => b.updateNetwork({ allowOut: ['no rule!'] }), /400.*allowOut/],
  'a name that is denied': [SandboxError, (b) => b.updateNetwork({ denyOut: ['example.com'] }), /400.*denyOut/],
  'a proxy for traffic out': [SandboxError, () => Sandbox.create({ network: { egressProxy: { address: 'a.example:1080' } } }), /400.*egressProxy/],
  'a bad name of a snapshot': [SandboxError, (b) => b.createSnapshot({ name: 'Not A Name' }), /400.*name/],
  'more sandboxes than there is memory': [RateLimitError, () => Sandbox.create({ retries: 0 })],
  'read of nothing': [FileNotFoundError, (b) => b.files.read('/no/such')],
  'list of nothing': [FileNotFoundError, (b) => b.files.list('/no/such')],
  'info of nothing': [FileNotFoundError, (b) => b.files.getInfo('/no/such')],
  'rename of nothing': [FileNotFoundError, (b) => b.files.rename('/no/such', '/tmp/x')],
  'watch of nothing': [NotFoundError, (b) => b.files.watchDir('/no/such', () => {})],
  'read of a directory': [InvalidArgumentError, (b) => b.files.read('/tmp')],
  'list of a file': [InvalidArgumentError, (b) => b.files.list('/etc/hostname')],
  'write to a directory': [InvalidArgumentError, (b) => b.files.write('/tmp', 'x')],
  'files of no user': [AuthenticationError, (b) => b.files.read('/etc/hostname', { user: 'nobody-here' })],
  'a full disk': [NotEnoughSpaceError, full],
  'a command that fails': [CommandExitError, (b) => b.commands.run('exit 3')],
  'a command of no user': [AuthenticationError, (b) => b.commands.run('true', { user: 'nobody-here' })],
  'a command in no directory': [InvalidArgumentError, (b) => b.commands.run('true', { cwd: '/no/such' })],
  'a command that takes too long': [TimeoutError, (b) => b.commands.run('sleep 60', { timeoutMs: 1000 })],
  'a request that takes too long': [TimeoutError, (b) => b.commands.list({ requestTimeoutMs: 1 })],
  'no such process': [NotFoundError, (b) => b.commands.connect(999999)],
  'input to no process': [NotFoundError, (b) => b.commands.sendStdin(999999, 'x')],
  'size of no terminal': [NotFoundError, (b) => b.pty.resize(999999, { cols: 1, rows: 1 })],
  'terminal of no user': [AuthenticationError, (b) => b.pty.create({ ...size, user: 'nobody-here' })],
}

check('javascript_every_bad_input', async () => {
  const box = await Sandbox.create({ timeoutMs: 600_000 })
  const wrong = []
  try {
    for (const [name, [kind, call, words]] of Object.entries(table)) {
      try {
        wrong.push(`${name}: ${JSON.stringify(await call(box))}, want ${kind.name}`)
      } catch (e) {
        if (!(e instanceof kind)) wrong.push(`${name}: ${e?.stack ?? e}, want ${kind.name}`)
        else if (words && !words.test(e.message)) wrong.push(`${name}: ${e.message} does not say ${words}`)
      }
    }
    assert.equal(wrong.length, 0, wrong.join('\n'))
  } finally {
    await box.kill()
  }
})

check('javascript_a_sandbox_that_is_paused_or_gone', async () => {
  const box = await Sandbox.create({ timeoutMs: 600_000 })
  await box.pause()
  await raises(e2b.SandboxNotFoundError, box.commands.run('true'))
  await raises(e2b.SandboxNotFoundError, box.setTimeout(10_000))
  await box.connect()
  await box.kill()
  await raises(SandboxError, box.commands.run('true'))
  await raises(SandboxError, box.files.read('/etc/hostname'))
  await raises(SandboxNotFoundError, box.getInfo())
})

// flood sends many requests under our key on one connection: the limit is one of
// requests in a second, which an SDK on a slow machine does not reach alone.
const flood = () => {
  const { hostname, port, pathname } = new URL(process.env.E2B_API_URL)
  const s = net.connect(port, hostname)
  s.on('error', () => {}).resume()
  s.write(`GET ${pathname}/sandboxes/${nobody} HTTP/1.1\r\nHost: wrenn\r\nX-API-Key: ${process.env.E2B_API_KEY}\r\n\r\n`.repeat(5000))
  return s
}

check('javascript_too_many_requests', async () => {
  const others = [flood(), flood()]
  let last
  for (let i = 0; i < 1000 && !(last instanceof RateLimitError); i++) {
    last = await Sandbox.getInfo(nobody, { retries: 0 }).catch((e) => e)
    assert.ok(last instanceof RateLimitError || last instanceof SandboxNotFoundError, last)
  }
  others.forEach((s) => s.destroy())
  assert.ok(last instanceof RateLimitError, 'no request was one too many')
  // By itself the SDK waits as long as it is told to.
  await raises(SandboxNotFoundError, Sandbox.getInfo(nobody))
})

await main()
