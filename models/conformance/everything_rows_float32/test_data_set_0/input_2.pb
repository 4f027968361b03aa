Bper_sample_weightsJ0£©¿MK>·C@?¹Ï–>½Ìµ?<Ã?ýYt¿+¼ ¾§@2Fd<
“½%e>