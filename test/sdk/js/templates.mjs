// Template builds in JavaScript.
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { assert, check, e2b, main, raises } from './checks.mjs'

const { BuildError, Sandbox, SandboxError, Template, waitForFile } = e2b
const context = fs.mkdtempSync(path.join(os.tmpdir(), 'sdk-js-'))
process.on('exit', () => fs.rmSync(context, { recursive: true }))
fs.mkdirSync(path.join(context, 'app/sub'), { recursive: true })
fs.writeFileSync(path.join(context, 'app/main.txt'), 'from the context')
fs.writeFileSync(path.join(context, 'app/sub/x.txt'), 'x')

const start = () => Template({ fileContextPath: context })

check('build_with_files_and_start_command', async () => {
  const t = start()
    .fromBaseImage()
    .setEnvs({ COLOR: 'gr een' })
    .copy('app/', '/srv/app')
    .setWorkdir('/srv/app')
    .runCmd('echo $COLOR >color.txt')
    .makeDir('made', { mode: 0o700 })
    .rename('sub/x.txt', 'made/y.txt')
    .setStartCmd('echo started >/tmp/started; exec sleep 1000', waitForFile('/tmp/started'))
  const logs = []
  const info = await Template.build(t, 'sdk-js', { onBuildLogs: (e) => logs.push(e.message) })
  assert.equal(info.name, 'sdk-js')
  assert(logs.some((m) => m.includes('RUN echo $COLOR')), String(logs))
  assert.equal((await Template.getBuildStatus(info)).status, 'ready')
  assert.equal(await Template.exists('sdk-js'), true)
  const box = await Sandbox.create('sdk-js', { timeoutMs: 120_000 })
  const r = await box.commands.run('pwd; cat color.txt main.txt made/y.txt; echo; echo $COLOR; pgrep -c -x sleep')
  assert.equal(r.stdout, '/srv/app\ngr een\nfrom the contextx\ngr een\n1\n')
  await box.kill()
})

check('rebuild_replaces_and_tags_stay', async () => {
  const info = await Template.build(start().fromTemplate('sdk-js').runCmd('echo v1 >/tmp/v'), 'sdk-js-two', { tags: ['v1', 'default'] })
  assert.deepEqual([...info.tags].sort(), ['default', 'v1'])
  await Template.build(start().fromTemplate('sdk-js').runCmd('echo v2 >/tmp/v'), 'sdk-js-two')
  for (const [name, want] of [['sdk-js-two', 'v2\n'], ['sdk-js-two:v1', 'v1\n']]) {
    const box = await Sandbox.create(name, { timeoutMs: 120_000 })
    assert.equal(await box.files.read('/tmp/v'), want)
    await box.kill()
  }
  const tags = await Template.getTags('sdk-js-two')
  assert.deepEqual(tags.map((t) => t.tag).sort(), ['default', 'v1'])
  assert.equal((await Template.assignTags('sdk-js-two:v1', 'prod')).buildId, info.buildId)
  await Template.removeTags('sdk-js-two', ['v1', 'prod'])
  await raises(SandboxError, Sandbox.create('sdk-js-two:v1'))
})

check('failed_build_tells_and_leaves_nothing', async () => {
  const t = start().fromBaseImage().runCmd('echo before').runCmd('echo the reason >&2; exit 7')
  const logs = []
  const e = await raises(BuildError, Template.build(t, 'sdk-js-bad', { onBuildLogs: (l) => logs.push(l.message) }))
  assert(e.message.includes('exited with 7') && e.message.includes('the reason'), e.message)
  assert(logs.includes('the reason'), String(logs))
  assert.equal(await Template.exists('sdk-js-bad'), false)
})

check('one_winner', async () => {
  const slow = () => start().fromTemplate('sdk-js').runCmd('sleep 3')
  const all = await Promise.allSettled([1, 2, 3].map(() => Template.build(slow(), 'sdk-js-race')))
  const won = all.filter((r) => r.status === 'fulfilled')
  assert(won.length >= 1 && all.every((r) => r.status === 'fulfilled' || r.reason.message.includes('under way')), JSON.stringify(all.map((r) => r.reason?.message)))
  assert.equal((await Template.getTags('sdk-js-race')).length, 1)
})

check('what_cannot_be_built', async () => {
  const e = await raises(BuildError, Template.build(start().fromUbuntuImage('24.04'), 'sdk-js-no'))
  assert(e.message.includes('fromTemplate'), e.message)
  await raises(BuildError, Template.build(start().fromBaseImage(), 'Not A Name'))
  assert.equal(await Template.exists('sdk-js-no'), false)
})

main()
