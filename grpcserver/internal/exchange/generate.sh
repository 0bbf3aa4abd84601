#!/bin/sh
# Makes the .pb.go of every exchange from its .proto. protoc is Debian's package
# protobuf-compiler; its plugin is built from the version of
# google.golang.org/protobuf that go.mod names.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
go build -o "$bin/protoc-gen-go" google.golang.org/protobuf/cmd/protoc-gen-go
for dir in . ../../verifier ../../join; do
	for proto in "$dir"/*.proto; do
		PATH="$bin:$PATH" protoc -I . -I "$dir" --go_out="$dir" --go_opt=paths=source_relative "$proto"
	done
done
