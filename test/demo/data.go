package main

import (
	"bytes"
	_ "embed"
	"encoding/csv"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"
)

// datasetRows is how many orders the data set has.
const datasetRows = 100_000

//go:embed serve.py
var serveProgram []byte

// dataset makes the orders of an invented shop, the same ones every time.
func dataset() ([]byte, error) {
	r := rand.New(rand.NewPCG(1, 2))
	goods := []string{"anvil", "bellows", "chisel", "drill", "easel", "file", "gouge", "hammer"}
	day := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	var b bytes.Buffer
	w := csv.NewWriter(&b)
	if err := w.Write([]string{"order", "date", "customer", "article", "count", "price"}); err != nil {
		return nil, err
	}
	for n := range datasetRows {
		err := w.Write([]string{
			strconv.Itoa(n + 1),
			day.AddDate(0, 0, r.IntN(365)).Format(time.DateOnly),
			fmt.Sprintf("c%05d", r.IntN(20_000)),
			goods[r.IntN(len(goods))],
			strconv.Itoa(1 + r.IntN(9)),
			fmt.Sprintf("%.2f", 1+r.ExpFloat64()*40),
		})
		if err != nil {
			return nil, err
		}
	}
	w.Flush()
	return b.Bytes(), w.Error()
}
