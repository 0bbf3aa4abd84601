// Package alerts has Prometheus itself judge the alert rules in deploy and the expressions of
// the dashboard. Each alert fires for the fault that it is about, after its own time, and
// none fires on a healthy node. It is a module of its own, because kleidi needs nothing of
// Prometheus' server.
package alerts
