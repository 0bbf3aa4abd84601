package verifierd

import (
	"github.com/beezy-dev/kleidi/grpcserver/verifier"
	"github.com/beezy-dev/kleidi/internal/files"
)

// auditFile is where verdicts go.
type auditFile struct{ files.Log }

func (f *auditFile) record(verdicts ...*verifier.Verdict) error {
	return files.AppendJSON(&f.Log, verdicts)
}
