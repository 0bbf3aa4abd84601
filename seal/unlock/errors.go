package unlock

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/seal"
)

func storeError(what string, err error) error {
	if seal.CauseOf(err) != "" {
		return err
	}
	return seal.Errorf(seal.CauseStore, "see the state folder's disk and permissions", "%s: %w", what, err)
}

// joinFailures keeps the first failure's cause and appends the fallback's message:
// the operator may find the fallback easier to mend.
func joinFailures(failure error, kind string, next error) error {
	if failure == nil || next == nil {
		return cmp.Or(failure, next)
	}
	text, hint := seal.SplitHint(failure)
	return &seal.Error{Cause: seal.CauseOf(failure), Hint: hint, Err: &failures{failure, next, fmt.Sprintf("%s; %s does not open either: %s", text, kind, next)}}
}

// failures is the first of several failures. Its text names all of them.
type failures struct {
	first, next error
	text        string
}

func (f *failures) Error() string { return f.text }
func (f *failures) Unwrap() error { return f.first }

// permanent reports whether no wrapper would open at a further attempt either.
func permanent(err error) bool {
	if f, ok := errors.AsType[*failures](err); ok {
		return permanent(f.first) && permanent(f.next)
	}
	return seal.IsPermanent(err)
}
