package lab

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Paths is where things are.
type Paths struct {
	Root  string // the module
	Cache string // what setup installed
}

// Setup runs e2e/setup, which does nothing where all is installed, and says where things are.
var Setup = sync.OnceValues(func() (Paths, error) {
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return Paths{}, fmt.Errorf("finding the module: %w", err)
	}
	p := Paths{Root: strings.TrimSpace(string(root))}
	out, err := Run(10*time.Minute, nil, "bash", filepath.Join(p.Root, "e2e", "setup"))
	if err != nil {
		return Paths{}, err
	}
	lines := strings.Split(out, "\n")
	p.Cache = lines[len(lines)-1]
	return p, nil
})

// Jars is the class path of a Kafka version.
func (p Paths) Jars(version string) string {
	return filepath.Join(p.Cache, "kafka-"+version) + "/*"
}

// Java is a java command for a class of Kafka's, or of ours, that starts fast and stays small.
func (p Paths) Java(version, heap string, args ...string) []string {
	return p.java(version, heap, []string{"-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"}, args)
}

// java is Java with the virtual machine's own choice of options.
func (p Paths) java(version, heap string, options, args []string) []string {
	all := append([]string{"-Xmx" + heap}, options...)
	all = append(all, "-Dlog4j2.configurationFile="+filepath.Join(p.Root, "e2e", "kafka", "log4j2.properties"),
		"-cp", filepath.Join(p.Cache, "java")+":"+p.Jars(version))
	return append(all, args...)
}

// installed says which programs are missing; setup installs them.
func installed(programs ...string) error {
	if _, err := Setup(); err != nil {
		return err
	}
	for _, name := range programs {
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("%s is missing, and e2e/setup did not install it: %w", name, err)
		}
	}
	return nil
}
