package join

import (
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/internal/exchange"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
)

// DefaultTimeout bounds a join, in which the new node also seals with its TPM.
const DefaultTimeout = 3 * time.Minute

const serviceName = "kleidi.join.v1.Join"

const methodName = "Join"

var service = exchange.Service{Name: serviceName, Method: methodName, File: "join.proto", Exporter: joinproof.ExporterLabel, Program: "kleidi serve"}
