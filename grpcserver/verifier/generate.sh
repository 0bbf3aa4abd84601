#!/bin/sh
# Makes verifier.pb.go from verifier.proto. protoc is Debian's package
# protobuf-compiler; its plugin is built from the version of
# google.golang.org/protobuf that go.mod names.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
go build -o "$bin/protoc-gen-go" google.golang.org/protobuf/cmd/protoc-gen-go
PATH="$bin:$PATH" protoc --go_out=. --go_opt=paths=source_relative verifier.proto
