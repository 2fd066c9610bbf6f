// Builds of templates in JavaScript.
import { assert, check, e2b, eventually, main, raises } from './checks.mjs'
import { chmodSync, mkdirSync, mkdtempSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const { Sandbox, Template, AuthenticationError, BuildError, TemplateError, SandboxError, waitForPort, waitForTimeout } = e2b
const ctx = mkdtempSync(join(tmpdir(), 'wrenn-js-'))
mkdirSync(join(ctx, 'app/sub'), { recursive: true })
writeFileSync(join(ctx, 'app/index.html'), 'a page\n')
writeFileSync(join(ctx, 'app/sub/ü.txt'), 'data\n')
writeFileSync(join(ctx, 'app/left.log'), 'no\n')
writeFileSync(join(ctx, 'run.sh'), '#!/bin/sh\necho $GREETING\n')
chmodSync(join(ctx, 'run.sh'), 0o644)
symlinkSync('index.html', join(ctx, 'app/link'))

const whole = () =>
  Template({ fileContextPath: ctx, fileIgnorePatterns: ['**/*.log'] })
    .fromBaseImage()
    .setEnvs({ GREETING: 'hello wörld' })
    .setWorkdir('/srv/app')
    .copy('app', '.')
    .copyItems([{ src: 'run.sh', dest: '/usr/local/bin/greet', user: 'root', mode: 0o755 }])
    .makeDir('made', { mode: 0o700 })
    .makeSymlink('index.html', 'second')
    .runCmd(['touch a', 'touch gone'])
    .rename('a', 'b')
    .remove('gone')
    .runCmd('useradd -m worker && chown -R worker /srv/app', { user: 'root' })
    .setUser('worker')
    .runCmd('echo to stdout; echo to stderr >&2')
    .setStartCmd('python3 -m http.server 8000', waitForPort(8000))

check('javascript_build_with_logs_and_tags', async () => {
  const logs = []
  const info = await Template.build(whole(), 'js-whole', { tags: ['v1', 'default'], memoryMB: 256, onBuildLogs: (e) => logs.push(e) })
  assert.equal(info.templateId, 'js-whole')
  assert.deepEqual([...info.tags].sort(), ['default', 'v1'])
  const text = logs.map((l) => l.message)
  assert(text.includes('to stdout') && text.includes('to stderr'), text.join('\n'))
  const box = await Sandbox.create('js-whole:v1', { timeoutMs: 300_000 })
  try {
    assert.equal((await box.commands.run('pwd; id -un; echo $GREETING; greet')).stdout, '/srv/app\nworker\nhello wörld\nhello wörld\n')
    assert.equal((await box.commands.run('ls')).stdout, 'b\nindex.html\nlink\nmade\nsecond\nsub\n')
    assert.equal((await box.commands.run('cat link sub/ü.txt; stat -c %a made')).stdout, 'a page\ndata\n700\n')
    assert.equal((await box.commands.run('curl -s localhost:8000/index.html')).stdout, 'a page\n')
    const i = await box.getInfo()
    assert.equal(i.name, 'js-whole')
    assert.equal(i.memoryMB, 256)
  } finally {
    await box.kill()
  }
})

check('javascript_names_and_tags', async () => {
  assert.equal(await Template.exists('js-whole'), true)
  assert.equal(await Template.aliasExists('js-whole:v1'), true)
  assert.equal(await Template.exists('js-none'), false)
  await Template.assignTags('js-whole:v1', ['prod', 'two'])
  assert.deepEqual((await Template.getTags('js-whole')).map((t) => t.tag).sort(), ['default', 'prod', 'two', 'v1'])
  await Template.removeTags('js-whole', ['two', 'prod'])
  assert.deepEqual((await Template.getTags('js-whole')).map((t) => t.tag).sort(), ['default', 'v1'])
  await raises(TemplateError, Template.assignTags('js-none', 'x'))
  await raises(TemplateError, Template.getTags('js-none'))
  await raises(SandboxError, Sandbox.create('js-whole:two'))
})

check('javascript_build_in_the_background', async () => {
  const t = Template().fromTemplate('js-whole:v1').setStartCmd('sleep 1000', waitForTimeout(1000))
  const info = await Template.buildInBackground(t, 'js-child')
  const s = await eventually(async () => {
    const s = await Template.getBuildStatus(info, { logsOffset: 0 })
    return s.status === 'ready' || s.status === 'error' ? s : null
  }, 240_000)
  assert.equal(s.status, 'ready', JSON.stringify(s))
  assert(s.logEntries.some((e) => e.message === 'START sleep 1000'))
})

check('javascript_build_that_fails', async () => {
  const t = Template().fromTemplate('js-child').runCmd('true').runCmd('echo the reason >&2; exit 7')
  const e = await raises(BuildError, Template.build(t, 'js-child'))
  assert.match(e.message, /exited with 7[^]*the reason/)
  const s = await raises(BuildError, Template.build(Template().fromTemplate('js-child').setStartCmd('exit 9', 'false'), 'js-bad'))
  assert.match(s.message, /start command/)
  assert.equal(await Template.exists('js-bad'), false)
})

check('javascript_bad_builds_are_refused_by_name', async () => {
  const refused = async (t, what, name = 'js-refused', o = {}) =>
    assert.match((await raises(BuildError, Template.build(t, name, o))).message, what)
  const ok = () => Template().fromBaseImage()
  await refused(Template().fromImage('localhost:1/x'), /fromImage/)
  await refused(Template().fromTemplate('no-such').runCmd('true'), /no-such/)
  await refused(ok(), /name/, 'Not A Name')
  await refused(ok(), /tags/, 'js-refused', { tags: ['not a tag'] })
  await refused(ok(), /cpuCount/, 'js-refused', { cpuCount: 1000 })
  await raises(AuthenticationError, Template.build(ok(), 'js-refused', { apiKey: 'e2b_' + '0'.repeat(40) }))
  await raises(AuthenticationError, Template.exists('js-whole', { apiKey: 'e2b_' + '0'.repeat(40) }))
})

check('javascript_templates_are_removed', async () => {
  for (const name of ['js-child', 'js-whole']) {
    assert.equal(await Sandbox.deleteSnapshot(name), true)
    assert.equal(await Template.exists(name), false)
  }
})

await main()
