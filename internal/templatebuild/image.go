package templatebuild

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/control"
	"git.omukk.dev/wrenn/sandbox/internal/oci"
)

// An image becomes a template's base in a sandbox of its own, made from base:
// its layers are unpacked there, by the guest agent, beside the root; then the
// sandbox boots from the image's files. What is hostile in an image meets a
// guest, and never the host.

//go:embed provision.sh
var provisionScript string

// agent is the guest agent's program, in base and in what becomes of an image.
const agent = "/usr/local/bin/envd"

// resolve finds the image.
func (b *Builder) resolve(ctx context.Context, s source) (*oci.Image, error) {
	im, err := b.opt.Images.Resolve(ctx, *s.image, s.credentials)
	if err != nil && ctx.Err() == nil {
		err = control.Invalid("fromImage", "%v", err)
	}
	return im, err
}

// takeImage makes the image's files the sandbox's.
func (w *worker) takeImage(ctx context.Context, im *oci.Image) error {
	for i := range im.Layers() {
		w.log.say("info", "Layer %d of %d (%d KiB)", i+1, im.Layers(), (im.LayerSize(i)+1023)>>10)
		if err := w.unpackLayer(ctx, im, i); err != nil {
			return control.Invalid("fromImage", "layer %d: %v", i+1, err)
		}
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"make it a sandbox's", func() error { return w.asRoot(ctx, agent, "adopt-root") }},
		{"boot from it", func() error { return w.b.opt.Sandboxes.Reboot(ctx, w.id, w.b.sandboxLimit()) }},
		{"remove the old files", func() error { return w.asRoot(ctx, agent, "drop-old-root") }},
		{"complete it", func() error { return w.asRoot(ctx, "/bin/sh", "-c", provisionScript) }},
	} {
		if err := step.do(); err != nil {
			if control.CodeOf(err) == control.CodeInternal && ctx.Err() == nil {
				err = control.Invalid("fromImage", "%s: %v", step.what, err)
			}
			return err
		}
	}
	return w.takeConfig(ctx, im)
}

// takeConfig has the image's variables hold for every process. Its user and
// directory do not, as with E2B: commands run as user, in /home/user.
func (w *worker) takeConfig(ctx context.Context, im *oci.Image) error {
	envs := map[string]string{}
	for _, e := range im.Env {
		name, value, _ := strings.Cut(e, "=")
		if !envRE.MatchString(name) || strings.ContainsRune(value, 0) {
			w.log.say("warn", "the image's variable %.80q is left out", name)
			continue
		}
		envs[name] = value
	}
	w.defaults = Defaults{Envs: envs}
	if im.User != "" || im.Workdir != "" && im.Workdir != "/" {
		w.log.say("info", "the image's user (%.40q) and directory (%.200q) are not taken, as with E2B; USER and WORKDIR set them", im.User, im.Workdir)
	}
	return w.saveDefaults(ctx)
}

// asRoot runs a program of the guest to its end.
func (w *worker) asRoot(ctx context.Context, cmd string, args ...string) error {
	c, err := w.b.opt.Sandboxes.Start(ctx, w.id, control.ExecRequest{Cmd: cmd, Args: args, User: "root", Cwd: "/"})
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.Send(control.ExecInput{CloseStdin: true}) // one that has ended already is no failure
	ev, err := w.follow(c)
	if err == nil && ev.ExitCode != 0 {
		err = w.exitError(ev)
	}
	return err
}

// layerPiece is how much of a layer is sent at a time.
const layerPiece = 256 << 10

// unpackLayer sends a layer to the guest, which unpacks it.
func (w *worker) unpackLayer(ctx context.Context, im *oci.Image, i int) error {
	c, err := w.b.opt.Sandboxes.Start(ctx, w.id, control.ExecRequest{Cmd: agent, Args: []string{"unpack-layer"}, User: "root", Cwd: "/"})
	if err != nil {
		return err
	}
	defer c.Close()
	// A process that ends early ends the download, too.
	reading, stop := context.WithCancel(ctx)
	defer stop()
	layer, err := im.Layer(reading, i)
	if err != nil {
		return err
	}
	defer layer.Close()
	var end control.ExecEvent
	var lost error
	ended := make(chan struct{})
	go func() { // ends with the process, or when c is closed
		defer close(ended)
		defer stop()
		end, lost = w.follow(c)
	}()
	readErr, sendErr := send(c, layer)
	if readErr != nil && reading.Err() == nil {
		return readErr
	}
	// What the process says of its end comes before that it took no more.
	select {
	case <-ended:
	case <-ctx.Done():
		return ctx.Err()
	}
	if lost == nil && end.ExitCode != 0 {
		return w.exitError(end)
	}
	return errors.Join(lost, readErr, sendErr)
}

// send gives a command its input.
func send(c Command, r io.Reader) (readErr, sendErr error) {
	for {
		buf := make([]byte, layerPiece) // the last one may still be on its way
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			if serr := c.Send(control.ExecInput{Stdin: buf[:n]}); serr != nil {
				return nil, fmt.Errorf("send it to the sandbox: %w", serr)
			}
		}
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF: // ReadFull's own; a layer's is wrapped
			return nil, c.Send(control.ExecInput{CloseStdin: true})
		default:
			return err, nil
		}
	}
}
