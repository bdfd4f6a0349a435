//go:build !linux

package store

func overwritesInPlace(string) bool { return false }

func (p *prealloc) extend() error { return nil }
