module github.com/beezy-dev/kleidi/e2e/servers/pause

go 1.26.0
