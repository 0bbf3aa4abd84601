# The pure-Go kleidi, alone in its image: docker build --build-arg VERSION=v1 .
# Every RUN is in exec form, so that the build stage needs no shell and can start
# from scratch with a mounted toolchain (.ci/image), where no base image can be pulled.
ARG GO_IMAGE=golang:1.26

FROM ${GO_IMAGE} AS build
ARG VERSION=unknown
ENV CGO_ENABLED=0 GOTOOLCHAIN=local GOMODCACHE=/go/pkg/mod GOCACHE=/go/cache GOEXPERIMENT=runtimesecret \
    GOFLAGS="-trimpath -buildvcs=false '-ldflags=-s -w -X main.buildVersion=${VERSION}'"
# WORKDIR makes the folder; the compiler needs /tmp
WORKDIR /tmp
WORKDIR /src
COPY . .
RUN ["/usr/local/go/bin/go", "build", "-o", "/out/kleidi", "./cmd/kleidi"]

FROM scratch
LABEL org.opencontainers.image.title="kleidi" \
      org.opencontainers.image.source="https://github.com/beezy-dev/kleidi" \
      org.opencontainers.image.description="KMS v2 provider for Kubernetes: the KEK is sealed to the node's TPM"
COPY --from=build /out/kleidi /kleidi
# root: the device, the state folder and the sockets belong to it
ENTRYPOINT ["/kleidi"]
CMD ["serve"]
