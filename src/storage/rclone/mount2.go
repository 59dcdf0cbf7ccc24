// Package mount2 stands in for rclone's second way to mount: the worker names the first.
package mount2
