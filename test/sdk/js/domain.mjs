// Everything by names below a domain, over TLS.
import { assert, check, e2b, eventually, main, raises } from './checks.mjs'
import http2 from 'node:http2'

const { Sandbox, TimeoutError } = e2b
const box = await Sandbox.create({ timeoutMs: 300_000 })

check('javascript_commands_and_files_over_tls', async () => {
  assert.equal(box.sandboxDomain, process.env.E2B_DOMAIN)
  assert.equal((await box.commands.run('echo tls')).stdout, 'tls\n')
  await box.files.write('f', 'x'.repeat(1 << 20))
  assert.equal((await box.files.read('f')).length, 1 << 20)
  assert.equal((await (await fetch(await box.downloadUrl('f'))).text()).length, 1 << 20)
})

check('http2_by_alpn', async () => {
  const session = http2.connect(`https://${box.getHost(49983)}`)
  const status = await new Promise((done, failed) => {
    session.on('error', failed)
    const r = session.request({ ':path': '/health' })
    r.on('response', (h) => done(h[':status']))
    r.end()
  })
  session.close()
  assert.equal(status, 204)
})

check('websockets_to_a_published_port', async () => {
  // A server that accepts, and echoes one short frame unmasked.
  const program = `
import base64, hashlib, socket
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("", 9000)); s.listen()
while True:
    c, _ = s.accept()
    head = b""
    while b"\\r\\n\\r\\n" not in head: head += c.recv(4096)
    key = [l.split(b": ")[1] for l in head.split(b"\\r\\n") if l.lower().startswith(b"sec-websocket-key")][0]
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    c.sendall(b"HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\nSec-WebSocket-Accept: " + accept + b"\\r\\n\\r\\n")
    f = c.recv(4096); n = f[1] & 127; mask = f[2:6]
    c.sendall(bytes([0x81, n]) + bytes(b ^ mask[i % 4] for i, b in enumerate(f[6:6+n])))
`
  await box.files.write('ws.py', program)
  await box.commands.run('python3 ws.py', { background: true, timeoutMs: 0 })
  const once = () => new Promise((done) => {
    const ws = new WebSocket(`wss://${box.getHost(9000)}/`)
    ws.onopen = () => ws.send('hello')
    ws.onmessage = (m) => { done(m.data); ws.close() }
    ws.onerror = () => done(null)
  })
  assert.equal(await eventually(once), 'hello')
})

check('javascript_kill_while_streaming_over_http2', async () => {
  const h = await box.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
  const [e] = await Promise.all([raises(TimeoutError, h.wait()), box.kill()])
  assert.match(e.message, /sandbox was killed/)
})

await main()
