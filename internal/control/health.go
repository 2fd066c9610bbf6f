package control

import "context"

// Check is one thing that has to hold for the server to do its work. Do gives
// an *Error whose message says to the caller what is wrong.
type Check struct {
	Name string
	Do   func(context.Context) error
}

// Ready tells whether the store answers and the host's state has been taken in
// once since the start.
func (s *Service) Ready(ctx context.Context) error {
	if err := s.checkDatabase(ctx); err != nil {
		return err
	}
	return s.checkStart(ctx)
}

// Healthy tells whether new work can be taken: Ready, and the host answers.
func (s *Service) Healthy(ctx context.Context) error {
	if err := s.Ready(ctx); err != nil {
		return err
	}
	return s.checkHost(ctx)
}

// LiveChecks are for whether this process does its work: the database and the
// host agent answer.
func (s *Service) LiveChecks() []Check {
	return []Check{{"database", s.checkDatabase}, {"host", s.checkHost}}
}

// ReadyChecks are for whether new work can be taken.
func (s *Service) ReadyChecks() []Check {
	return []Check{{"start", s.checkStart}, {"database", s.checkWritable}, {"host", s.checkHost}}
}

func (s *Service) checkDatabase(ctx context.Context) error {
	if err := s.store.Ping(ctx); err != nil {
		return &Error{Code: CodeHostUnavailable, Message: "the database does not answer", Err: err}
	}
	return nil
}

func (s *Service) checkWritable(ctx context.Context) error {
	if err := s.checkDatabase(ctx); err != nil {
		return err
	}
	if err := s.store.CheckWritable(ctx); err != nil {
		return &Error{Code: CodeHostUnavailable, Message: "the database answers, but cannot be written", Err: err}
	}
	return nil
}

func (s *Service) checkStart(context.Context) error {
	if !s.reconciled.Load() {
		return errorf(CodeHostUnavailable, "starting: the host's sandboxes have not been read yet")
	}
	return nil
}

func (s *Service) checkHost(ctx context.Context) error {
	if _, err := s.host.Info(ctx); err != nil {
		return &Error{Code: CodeHostUnavailable, Message: "the host agent does not answer", Err: err}
	}
	return nil
}
