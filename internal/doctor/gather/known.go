package gather

import (
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/internal/doctor"
)

// limit is how long one source may take; the TPM has its own (tpm.timeout).
const limit = 10 * time.Second

func known[T any](v T, err error) doctor.Known[T] {
	if err != nil {
		return doctor.Known[T]{Why: strings.ReplaceAll(err.Error(), "\n", "; ")}
	}
	return doctor.Known[T]{Value: &v}
}
