// Package docs runs the commands that the documents show, as they stand there, on
// simulated machines: a reader who copies them gets what the text says.
//
// A comment before each block of commands says what becomes of it:
//
//	<!-- run on: a serving node -->       start from that scene
//	<!-- run next -->                     go on where the last block ended
//	<!-- not run: needs a cluster -->     it can't run here, and why
//	<!-- prints -->                       before a text block: part of what the last block prints
//	<!-- configures -->                   before a YAML block: it goes into kleidi's configuration
package docs
