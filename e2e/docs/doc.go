// Package docs runs the commands in the documents, unchanged, on simulated machines: a
// reader who copies them gets the result that the text promises.
//
// A comment before each block of commands says how to run it:
//
//	<!-- run on: a serving node -->       start from that scene
//	<!-- run next -->                     continue where the last block ended
//	<!-- run next on cp-2 -->             continue at another machine of the scene
//	<!-- …, exit code 3 -->               the last command ends with this exit code
//	<!-- not run: needs a cluster -->     it can't run here, with the reason
//	<!-- prints -->                       before a text block: part of the last block's output
//	<!-- configures -->                   before a YAML block: it goes into kleidi's configuration
package docs
