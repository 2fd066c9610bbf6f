package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"
)

// input writes to a process: its standard input, or its terminal. Writes keep
// their order; one that the process does not read waits, and its caller's
// context ends the wait.
type input struct {
	// turn holds one token: who has it may use file.
	turn chan struct{}
	// file is nil when the input is closed.
	file *os.File
	tty  bool
}

func newInput(f *os.File, tty bool) *input {
	in := &input{turn: make(chan struct{}, 1), file: f, tty: tty}
	in.turn <- struct{}{}
	return in
}

var errInputClosed = connect.NewError(connect.CodeFailedPrecondition, errors.New("the process's input is closed"))

// take waits for the turn; the caller gives it back by in.turn <- struct{}{}.
func (in *input) take(ctx context.Context) error {
	select {
	case <-in.turn:
		return nil
	case <-ctx.Done():
		return contextError(ctx)
	}
}

func (in *input) write(ctx context.Context, data []byte) error {
	if err := in.take(ctx); err != nil {
		return err
	}
	defer func() { in.turn <- struct{}{} }()
	if in.file == nil {
		return errInputClosed
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = in.file.SetWriteDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	_, err := in.file.Write(data)
	if !stop() {
		<-interrupted
		_ = in.file.SetWriteDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return contextError(ctx)
	default:
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("writing to the process: %w", err))
	}
}

// closeWrite is the end of input. On a terminal that is the EOT character,
// which a program may read as something else.
func (in *input) closeWrite(ctx context.Context) error {
	if in.tty {
		return in.write(ctx, []byte{4})
	}
	if err := in.take(ctx); err != nil {
		return err
	}
	defer func() { in.turn <- struct{}{} }()
	if in.file == nil {
		return nil
	}
	err := in.file.Close()
	in.file = nil
	return err
}

// abandon closes the input of a process that has ended.
func (in *input) abandon() {
	if in.tty {
		return // the terminal is closed with its output
	}
	// A writer may be at it. It is woken, as the pipe has no reader any more,
	// unless a child of the process kept it: then its context ends the wait.
	go func() {
		<-in.turn
		if in.file != nil {
			_ = in.file.Close()
			in.file = nil
		}
		in.turn <- struct{}{}
	}()
}

// contextError says why a call's context ended.
func contextError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return connect.NewError(connect.CodeDeadlineExceeded, ctx.Err())
	}
	return connect.NewError(connect.CodeCanceled, ctx.Err())
}
