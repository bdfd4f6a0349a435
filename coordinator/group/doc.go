// Package group is the rules of consumer groups and their offsets.
package group
