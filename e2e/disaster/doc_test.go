// Package disaster inflicts every possible loss on a cluster of three nodes, with real
// etcds and kube-apiservers, and follows docs/disaster-recovery.md each time, until every
// Secret can be read again. The commands are those of the document.
package disaster
