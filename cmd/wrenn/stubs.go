package main

import (
	"errors"

	"github.com/spf13/cobra"
)

// This file is to be replaced by the integrator: up.go, pager.go, doctor.go,
// store.go and template_build.go define these five functions for real.

func newUpCmd() *cobra.Command     { return stubCmd("up", "Serve the API") }
func newPagerCmd() *cobra.Command  { return stubCmd("pager", "Serve guest memory and disks") }
func newDoctorCmd() *cobra.Command { return stubCmd("doctor", "Tell what this host can do") }
func newStoreCmd() *cobra.Command  { return stubCmd("store", "Verify and clean the store") }
func newTemplateBuildCmd() *cobra.Command {
	return stubCmd("build", "Build the base template")
}

func stubCmd(use, short string) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, RunE: func(*cobra.Command, []string) error {
		return errors.New("not in this program yet")
	}}
}
